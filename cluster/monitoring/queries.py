"""Write the queries that several panels have in common, with Grafana's variables in them."""

# Probes and Serve's own routes are no requests for images.
HTTP = 'route!~"/readyz|/health|/-/.*"'
TIER = 'tier=~"$tier"'


def per_second(series: str, by: str, matchers: str = TIER) -> str:
    """Return the query for the rate of a counter, added up by these labels."""
    return f"sum by ({by}) (rate(ray_{series}_total{{{matchers}}}[$__rate_interval]))"


def quantile(share: float, series: str, by: str = "tier", matchers: str = TIER) -> str:
    """Return the query for a quantile of a histogram, by these labels."""
    rate = f"rate(ray_{series}_bucket{{{matchers}}}[$__rate_interval])"
    labels = ", ".join(each for each in (by, "le") if each)
    return f"histogram_quantile({share:g}, sum by ({labels}) ({rate}))"


def kept(by: str = "", window: str = "$__rate_interval") -> str:
    """Return the query for the share of promises that were kept; 0 if none of some was."""
    total, missed = (
        f"sum{by} (increase(ray_flux_promises_total{{{matchers}}}[{window}]))"
        for matchers in (TIER, f'outcome="missed", {TIER}')
    )
    return f"1 - ({missed} or 0 * {total}) / {total}"


def latest(series: str, by: str = "tier", matchers: str = TIER) -> str:
    """Return the query for a gauge of which one process tells, or all tell the same."""
    return f"max by ({by}) (ray_{series}{{{matchers}}})"
