"""weights-claim.yaml and weights-job.yaml: weights are there before Ray asks for them."""

from typing import Any

from tests.kuberay.conftest import CASES, Object, Render, env_of, groups_of, values_of

CASE = {path.stem: values_of(path) for path in CASES}
COMMAND = ["flux-ray", "weights", "pull", "/etc/flux-ray/serve/serve.yaml"]


def volume_of(pod: Object) -> Object:
    [volume] = [each for each in pod["volumes"] if each["name"] == "weights"]
    return volume


def test_a_claim_of_all_nodes_is_made(render: Render) -> None:
    rendered = render()
    [claim] = rendered["weights-claim.yaml"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    [group] = groups_of(rendered).values()
    told = volume_of(group["template"]["spec"])["persistentVolumeClaim"]
    assert told == {"claimName": claim["metadata"]["name"]}


def test_a_claim_or_a_folder_that_exists_is_taken(render: Render) -> None:
    for case, expected in (
        ("existing-secrets", {"persistentVolumeClaim": {"claimName": "weights"}}),
        (
            "minimal",
            {"hostPath": {"path": "/var/lib/flux-ray/weights", "type": "Directory"}},
        ),
    ):
        rendered = render(CASE[case])
        assert rendered["weights-claim.yaml"] == []
        [group] = groups_of(rendered).values()
        volume = volume_of(group["template"]["spec"])
        assert {key: value for key, value in volume.items() if key != "name"} == expected


def test_a_pod_pulls_what_is_missing_before_ray_starts(render: Render) -> None:
    [group] = groups_of(render(CASE["spare-nodes"])).values()
    [pull] = group["template"]["spec"]["initContainers"]
    assert pull["command"] == COMMAND
    told = {each["name"]: each for each in pull["env"]}
    assert told["HF_HOME"]["value"] == env_of(group)["HF_HOME"] == "/models"
    assert "HF_TOKEN" in told
    assert {"name": "weights", "mountPath": "/models"} in pull["volumeMounts"]
    [group] = groups_of(render(CASE["existing-secrets"])).values()
    assert "initContainers" not in group["template"]["spec"]


def test_licences_are_accepted_by_people_only(render: Render) -> None:
    [group] = groups_of(render({"weights": {"acceptLicences": True}})).values()
    assert group["template"]["spec"]["initContainers"][0]["command"] == [
        *COMMAND,
        "--accept-licence",
    ]
    [group] = groups_of(render()).values()
    assert group["template"]["spec"]["initContainers"][0]["command"] == COMMAND


def job_with(render: Render, **values: Any) -> Object:
    [job] = render(values | {"weights": {"job": True, "endpoint": "https://hub"}})[
        "weights-job.yaml"
    ]
    return job


def test_a_job_pulls_them_once_for_all(render: Render) -> None:
    assert render()["weights-job.yaml"] == []
    job = job_with(render)
    pod = job["spec"]["template"]["spec"]
    [pull] = pod["containers"]
    assert pull["command"] == COMMAND
    assert {"name": "HF_ENDPOINT", "value": "https://hub"} in pull["env"]
    assert "persistentVolumeClaim" in volume_of(pod)
    assert "nvidia.com/gpu" not in pull["resources"]["limits"]


def test_another_serve_config_is_another_job(render: Render) -> None:
    """A Job cannot be changed, and one that has ended is not run again."""
    names = {
        job_with(render, **values)["metadata"]["name"]
        for values in (
            {},
            {"serve": {"args": {"flux-2-dev": {"weights": "/models/dev"}}}},
            {"image": {"tag": "2"}},
        )
    }
    assert len(names) == 3
    assert job_with(render)["metadata"]["name"] in names
