"""poddisruptionbudget.yaml: a drain of nodes takes one Pod of a group at a time."""

from tests.kuberay.conftest import CASES, Object, Render, groups_of, named, values_of

CASE = {path.stem: values_of(path) for path in CASES}


def left_by(objects: list[Object]) -> dict[str, int]:
    """Return how many Pods an eviction has to leave, by the budget's name."""
    return {name: each["spec"]["minAvailable"] for name, each in named(objects).items()}


def test_all_but_one_stay(render: Render) -> None:
    assert left_by(render()["poddisruptionbudget.yaml"]) == {"flux-h100": 2, "flux-head": 1}


def test_a_group_says_otherwise_and_a_lone_pod_may_go(render: Render) -> None:
    """`minReplicas` counts, as there may be no more; one Pod cannot be both kept and moved."""
    budgets = left_by(render(CASE["everything"])["poddisruptionbudget.yaml"])
    assert budgets == {"flux-h100": 1, "flux-l40s-spot": 1, "flux-head": 1}


def test_a_head_with_redis_may_go(render: Render) -> None:
    assert "flux-head" not in left_by(render(CASE["spare-nodes"])["poddisruptionbudget.yaml"])


def test_it_can_be_evaluated_for_these_pods(render: Render) -> None:
    """Kubernetes takes only a number of `minAvailable` for Pods whose owner has no scale."""
    rendered = render()
    for budget in rendered["poddisruptionbudget.yaml"]:
        assert isinstance(budget["spec"]["minAvailable"], int)
        assert "maxUnavailable" not in budget["spec"]
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    [group] = groups_of(rendered).values()
    selector = named(rendered["poddisruptionbudget.yaml"])["flux-h100"]["spec"]["selector"]
    assert selector["matchLabels"] == group["template"]["metadata"]["labels"]


def test_they_can_be_left_out(render: Render) -> None:
    assert render(CASE["minimal"])["poddisruptionbudget.yaml"] == []
