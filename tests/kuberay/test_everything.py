"""Whatever the values, all that the chart renders would be taken by a Kubernetes with KubeRay."""

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import helm_python

from tests.kuberay.conftest import CHART, Render
from tests.kuberay.schemas import errors_of


def test_all_of_it_is_valid(case: dict[str, Any], render: Render) -> None:
    objects = [each for objects in render(case).values() for each in objects]
    assert len(objects) >= 2
    errors = {f"{each['kind']} {each['metadata']['name']}": errors_of(each) for each in objects}
    assert {name: told for name, told in errors.items() if told} == {}
    names = Counter((each["kind"], each["metadata"]["name"]) for each in objects)
    assert max(names.values()) == 1


def test_what_pods_mount_and_read_is_made_or_given(case: dict[str, Any], render: Render) -> None:
    rendered = render(case)
    [service] = rendered["rayservice.yaml"]
    made = {each["metadata"]["name"] for objects in rendered.values() for each in objects}
    given = {
        secret["existing"] for secret in case.get("secrets", {}).values() if "existing" in secret
    }
    given |= {case.get("weights", {}).get("claim", {}).get("existing")}
    given |= {"tracing"}  # Of extraEnv.
    referred = set(references_in(service["spec"]))
    assert referred
    assert referred <= made | given


def references_in(value: Any) -> list[str]:
    """Return the names of Secrets, ConfigMaps and claims that a value refers to, at any depth."""
    if isinstance(value, list):
        return [name for each in value for name in references_in(each)]
    if not isinstance(value, dict):
        return []
    own = [value[key] for key in ("secretName", "claimName") if key in value]
    own += [value[key]["name"] for key in ("secretKeyRef", "configMap") if key in value]
    return own + references_in(list(value.values()))


def test_helm_lint_finds_nothing(case: dict[str, Any]) -> None:
    helm_python.disable_logging()
    report = helm_python.lint(CHART, case, strict=True)
    assert report["errors"] == []
    # 1 is a hint: that there is no icon.
    assert [each for each in report["messages"] if each["severity"] > 1] == []


def test_a_package_has_the_files_behind_the_links(tmp_path: Path, render: Render) -> None:
    """The Serve config file, the alerts and the dashboard are links to where they are tested."""
    helm_python.disable_logging()
    links = [path for path in (CHART / "files").iterdir() if path.is_symlink()]
    assert len(links) == 3
    archive = helm_python.Chart.load(CHART).save(tmp_path)
    with tarfile.open(archive) as packed:
        for link in links:
            member = packed.extractfile(f"flux-ray/files/{link.name}")
            assert member is not None
            assert member.read() == link.read_bytes()
