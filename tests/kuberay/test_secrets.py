"""secrets.yaml: made of what is given, and not made of what exists."""

from typing import Any

import yaml

from tests.kuberay.conftest import CASES, Render, env_of, groups_of, named, service_of, values_of

CASE = {path.stem: values_of(path) for path in CASES}


def test_nothing_is_made_of_nothing(render: Render) -> None:
    assert render()["secrets.yaml"] == []
    assert render(CASE["existing-secrets"])["secrets.yaml"] == []


def test_secrets_are_made_of_their_content(render: Render) -> None:
    made = {
        name: each["stringData"]
        for name, each in named(render(CASE["spare-nodes"])["secrets.yaml"]).items()
    }
    assert made == {
        "flux-ray-token": {"auth_token": "0123456789abcdef"},
        "flux-keys": {"keys.yaml": "keys: []\n"},
        "flux-hugging-face": {"token": "hf_made_up"},
        "flux-database": {"password": "a:b 'c'"},
        "flux-object-store": {"access-key-id": "id", "secret-access-key": "secret"},
        "flux-upsampler": {"key": "sk-made-up"},
        "flux-redis": {"password": "123"},
    }


def test_workers_read_them(render: Render) -> None:
    for case, hub, database in (
        ("spare-nodes", "flux-hugging-face", "flux-database"),
        ("existing-secrets", "hugging-face", "postgres"),
    ):
        [group] = groups_of(render(CASE[case])).values()
        env = env_of(group)
        assert env["HF_TOKEN"] == {"secretKeyRef": {"name": hub, "key": "token"}}
        assert env["PGPASSWORD"] == {"secretKeyRef": {"name": database, "key": "password"}}
        assert env["AWS_ACCESS_KEY_ID"]["secretKeyRef"]["key"] == "access-key-id"
        assert env["AWS_SECRET_ACCESS_KEY"]["secretKeyRef"]["key"] == "secret-access-key"
    [group] = groups_of(render()).values()
    assert not {"HF_TOKEN", "PGPASSWORD", "AWS_ACCESS_KEY_ID"} & env_of(group).keys()


def gateway_args(spec: dict[str, Any]) -> dict[str, Any]:
    [gateway] = [
        each
        for each in yaml.safe_load(spec["serveConfigV2"])["applications"]
        if each["name"] == "gateway"
    ]
    return gateway["args"]


def test_gateways_read_the_keys_where_they_are_mounted(render: Render) -> None:
    rendered = render(CASE["existing-secrets"])
    [group] = groups_of(rendered).values()
    pod = group["template"]["spec"]
    assert {"name": "keys", "secret": {"secretName": "api-keys"}} in pod["volumes"]
    mount = {"name": "keys", "mountPath": "/etc/flux-ray/keys", "readOnly": True}
    assert mount in pod["containers"][0]["volumeMounts"], (
        "a folder: changes of a subPath never arrive"
    )
    assert gateway_args(service_of(rendered))["keys_file"] == "/etc/flux-ray/keys/keys.yaml"
    assert "keys_file" not in gateway_args(service_of(render()))


def test_gateways_read_the_key_of_the_llm_where_it_is_mounted(render: Render) -> None:
    rendered = render(CASE["existing-secrets"])
    [group] = groups_of(rendered).values()
    pod = group["template"]["spec"]
    assert {"name": "upsampler", "secret": {"secretName": "llm"}} in pod["volumes"]
    mount = {"name": "upsampler", "mountPath": "/etc/flux-ray/upsampler", "readOnly": True}
    assert mount in pod["containers"][0]["volumeMounts"]
    upsampling = gateway_args(service_of(rendered))["upsampling"]
    given = CASE["existing-secrets"]["serve"]["args"]["gateway"]["upsampling"]
    assert upsampling == given | {"api_key_file": "/etc/flux-ray/upsampler/key"}
    own = given | {"api_key_file": "/models/key"}
    values = CASE["existing-secrets"] | {"serve": {"args": {"gateway": {"upsampling": own}}}}
    assert gateway_args(service_of(render(values)))["upsampling"] == own
    assert "upsampling" not in gateway_args(service_of(render(CASE["spare-nodes"])))


def test_no_secret_is_in_the_rayservice(render: Render) -> None:
    values = CASE["spare-nodes"]
    text = str(service_of(render(values)))
    content = [value for secret in values["secrets"].values() for value in secret.values()]
    assert [value for value in content if len(value) > 8 and value in text] == []
