"""What lies in deploy/, held to the schemas of what will read it."""

import gzip
import json
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray
import ray.autoscaler
import yaml
from ray.serve.schema import ServeDeploySchema

from raymoe.config import ServeConfig, TrainConfig, parse_config
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SCHEMAS = json.loads(gzip.decompress((Path(__file__).parent / "crds" / "kuberay-1.7.0.json.gz").read_bytes()))
"""Of KubeRay 1.7.0's resources (Apache-2.0), v1, by kind: its own `openAPIV3Schema`, without descriptions."""
VERSION = "0.1.0"


def strict(schema):
    """With unknown fields refused, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    held = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        held.setdefault("additionalProperties", False)
    return held


def resource(name):
    """The one resource of `ray.io` in a file of deploy/kuberay."""
    documents = yaml.safe_load_all((DEPLOY / "kuberay" / name).read_text())
    [found] = [document for document in documents if document["apiVersion"] == "ray.io/v1"]
    return found


def cluster_of(found):
    spec = found["spec"]
    return {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}[
        found["kind"]
    ]


RESOURCES = ["ray-cluster.raymoe.yaml", "ray-job.raymoe.yaml", "ray-service.raymoe.yaml"]


@pytest.mark.parametrize("name", RESOURCES)
def test_kuberay_takes_it(name):
    found = resource(name)
    schema = strict(SCHEMAS[found["kind"]])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(found, schema)
    # the schema would see a slip
    misspelt = json.loads(json.dumps(found))
    cluster_of(misspelt)["headGroupSpec"]["template"]["spec"]["container"] = []
    with pytest.raises(jsonschema.ValidationError, match="'container' was unexpected"):
        jsonschema.validate(misspelt, schema)


@pytest.mark.parametrize("name", RESOURCES)
def test_pods_are_what_the_guide_promises(name):
    cluster = cluster_of(resource(name))
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        [container] = pod["containers"]
        assert container["image"] == f"raymoe:{VERSION}-gpu"
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert container["livenessProbe"]["httpGet"]["path"] == "/api/local_raylet_healthz"
        assert "readinessProbe" not in container
        environment = {each["name"]: each["value"] for each in container.get("env", [])}
        assert "RAY_AUTH_MODE" not in environment
        if group is not cluster["headGroupSpec"]:
            drain_s = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
            assert 0 < drain_s < pod["terminationGracePeriodSeconds"]


def test_jobs_and_services_carry_what_raymoe_takes(tmp_path):
    tiny_model("olmoe").config.save_pretrained(tmp_path)
    # paths of the volume are not here
    there, here = "/data/models/olmoe", str(tmp_path)

    [told] = [
        document["data"]["train.yaml"].replace(there, here)
        for document in yaml.safe_load_all((DEPLOY / "kuberay" / "ray-job.raymoe.yaml").read_text())
        if document["kind"] == "ConfigMap"
    ]
    assert parse_config(TrainConfig, yaml.safe_load(told)).workers.max == 8

    serve = resource("ray-service.raymoe.yaml")["spec"]["serveConfigV2"].replace(there, here)
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(serve)).applications
    assert application.import_path == "raymoe.serving:build_app"
    assert ServeConfig.model_validate(application.args).engines == 2


def test_the_policy_lets_in_what_has_to_come_in():
    policy = yaml.safe_load((DEPLOY / "kuberay" / "network-policy.raymoe.yaml").read_text())
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    open_to_all = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert not open_to_all
    ports = [port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])]
    declared = {
        port["containerPort"]
        for name in RESOURCES
        for group in cluster_of(resource(name))["workerGroupSpecs"]
        for port in group["template"]["spec"]["containers"][0]["ports"]
    }
    assert set(ports) == declared


def test_ray_up_takes_the_launchers_file():
    tree = yaml.safe_load((DEPLOY / "launcher" / "aws.raymoe.yaml").read_text())
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(tree, schema)
    assert tree["head_node_type"] in tree["available_node_types"]
    assert tree["docker"]["image"] == f"raymoe:{VERSION}-gpu"


def test_the_image_has_the_pinned_ray_and_what_it_copies():
    told = (DEPLOY / "docker" / "Dockerfile").read_text()
    assert f"ARG RAY_VERSION={ray.__version__}\n" in told
    shown = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in told.splitlines() if line.startswith("COPY") for source in line.split()[2:-1]}
    assert copied == shown
    assert all((ROOT / source).exists() for source in copied)


def test_slurms_script_is_one_and_asks_for_its_file():
    script = DEPLOY / "slurm" / "raymoe-train.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "give a training YAML" in done.stderr
