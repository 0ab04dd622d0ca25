"""Deploying without `searoom up`, from another folder, to a Ray cluster of one's own."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import openai
import psutil
import pytest
import yaml
from clusters import eventually, free_port, title

from cluster.local import LocalCluster, NodeSpec
from serving.auth import load_key

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
REGION = {"ray.io/availability-region": "local"}
GPU = {"ray.io/accelerator-type": "H100"}
PROMPT = [{"role": "user", "content": "Name three rivers of Europe."}]


class Bare:
    """A Ray cluster with nothing of ours in it, and what a user does with it from another folder."""

    def __init__(self, cluster: LocalCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.port = free_port()
        self.environment = os.environ | cluster.environment
        self.key = load_key()

    def run(self, *command: str, timeout_s: float = 120) -> str:
        tool = str(BIN / command[0])
        done = subprocess.run(
            [tool, *command[1:]],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def config(self, *, replicas: int = 1, **engine: object) -> str:
        """manifests/local.yaml with our port and these engine keys; its name in the folder."""
        config = yaml.safe_load((ROOT / "manifests" / "local.yaml").read_text())
        config["http_options"]["port"] = self.port
        args = config["applications"][0]["args"]
        args["engine"] |= engine
        args["model"]["dtype"] = "float32"
        args["regions"] = [{"name": "local", "replicas": replicas}]
        (self.folder / "manifests" / "test.yaml").write_text(yaml.safe_dump(config))
        return "manifests/test.yaml"

    def serve_status(self) -> dict:
        status = yaml.safe_load(self.run("serve", "status"))
        return status["applications"].get("searoom", {"status": "absent", "deployments": {}})

    def wait_running(self) -> None:
        def running() -> bool:
            status = self.serve_status()
            assert status["status"] != "DEPLOY_FAILED", status
            return status["status"] == "RUNNING"

        eventually(running, timeout_s=90, interval_s=0.5)

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=self.key, max_retries=5, timeout=120
        )

    async def answer(self) -> str:
        reply = await self.client().chat.completions.create(
            model="smollm2-135m-instruct", messages=PROMPT, temperature=0, max_tokens=24
        )
        return reply.choices[0].message.content

    def processes(self, name: str) -> list[psutil.Process]:
        return [p for p in map(psutil.Process, self.cluster.pids()) if name in title(p)]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Three pretend nodes in one region; the last claims three GPUs."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for package in ("cluster", "serving", "kernels", "autoscaler", "manifests"):
        shutil.copytree(ROOT / package, folder / package)
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_STATE_HOME", str(folder / "state"))
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where cpu_executor is
    nodes = [NodeSpec(REGION), NodeSpec(REGION), NodeSpec(REGION | GPU, num_gpus=3)]
    with LocalCluster(nodes) as cluster:
        yield Bare(cluster, folder)
    patch.undo()


@pytest.fixture(scope="module")
def reference():
    """Answers found so far, by the way they were deployed: all must be the same."""
    return {}


async def test_ray_job_submit_deploys_and_a_replica_that_leaves_finishes_its_streams(bare, reference):
    """No install step: the job's working directory is enough. Then from two replicas to one, streams on."""
    submit = ("ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "serving", "deploy")
    bare.run(*submit, bare.config(replicas=2))
    assert bare.serve_status()["status"] == "RUNNING"
    reference["tp 1"] = await bare.answer()

    client = bare.client()

    async def stream_all(number: int) -> int:
        stream = await client.chat.completions.create(
            model="smollm2-135m-instruct", messages=PROMPT, stream=True, max_tokens=120, seed=number,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        return [chunk async for chunk in stream][-1].usage.completion_tokens

    streams = [asyncio.create_task(stream_all(number)) for number in range(6)]
    await asyncio.sleep(3)
    assert len(bare.processes("ServeReplica:searoom:ModelReplica")) == 2
    await asyncio.to_thread(bare.run, *submit, bare.config(replicas=1))
    assert await asyncio.gather(*streams) == [120] * 6
    eventually(lambda: len(bare.processes("ServeReplica:searoom:ModelReplica")) == 1, timeout_s=60)


async def test_serve_deploy_with_three_ranks_gives_the_same_tokens(bare, reference):
    """`serve deploy` of the same file with tp=3 on 2 cores; greedy float32 tokens equal tp=1's.

    A killed follower rank then ends the group within 2 s, and Serve replaces it.
    """
    bare.run("serve", "deploy", bare.config(tensor_parallel=3))
    bare.wait_running()
    eventually(lambda: len(bare.processes("ray::Rank")) == 3, timeout_s=60)
    reference["tp 3"] = await bare.answer()
    assert reference["tp 3"] == reference["tp 1"]

    stream = await bare.client().chat.completions.create(
        model="smollm2-135m-instruct", messages=PROMPT, stream=True, max_tokens=2000,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    await anext(aiter(stream))
    follower = next(p for p in bare.processes("ray::Rank") if "follow" in title(p))
    follower.kill()
    killed = time.monotonic()
    with pytest.raises(openai.APIError):
        async for _ in stream:
            pass
    assert time.monotonic() - killed < 2
    assert await bare.answer() == reference["tp 1"]  # the client's retries bridge the restart


async def test_a_group_spreads_over_nodes(bare, reference):
    """One rank a node: the same three ranks on three nodes give the same tokens."""
    bare.run("serve", "deploy", bare.config(tensor_parallel=3, ranks_per_node=1))
    bare.wait_running()
    reference["tp 3 on 3 nodes"] = await bare.answer()
    assert reference["tp 3 on 3 nodes"] == reference["tp 1"]
    assert len(set(nodes_of_ranks(bare))) == 3


async def test_gpu_ranks_are_placed_by_count_and_label(bare, reference):
    """`device: cuda` puts all ranks, one GPU each, on the node that has three and the right label."""
    engine = {"device": "cuda", "accelerator": "H100", "executor": "cpu_executor:CpuWorker"}
    bare.run("serve", "deploy", bare.config(tensor_parallel=3, **engine))
    bare.wait_running()
    assert await bare.answer() == reference["tp 1"]
    assert len(set(nodes_of_ranks(bare))) == 1


def nodes_of_ranks(bare: Bare) -> list[str]:
    """The node of each of three ranks, once the ranks of the deployment before are gone."""

    def nodes() -> list[str] | None:
        listed = bare.run("ray", "list", "actors", "--format", "json", "--filter", "class_name=Rank")
        alive = [actor["node_id"] for actor in json.loads(listed) if actor["state"] == "ALIVE"]
        return alive if len(alive) == 3 else None

    return eventually(nodes)


@pytest.mark.full
def test_up_joins_a_running_cluster_and_leaves_it_standing(bare):
    """`searoom up --address` serves on the cluster; `searoom down` takes only our application."""
    bare.run("serve", "shutdown", "--yes")
    eventually(lambda: bare.serve_status()["status"] == "absent", timeout_s=60)
    up = subprocess.Popen(
        [sys.executable, "-m", "serving", "up", "--address", bare.cluster.address, "--port", str(bare.port)],
        env=bare.environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        state = Path(bare.environment["XDG_STATE_HOME"]) / "searoom" / "running.json"
        eventually(lambda: state.exists() and json.loads(state.read_text())["ready"], timeout_s=90)
        bare.run("searoom", "chat", "hello", "--max-tokens", "3")
        bare.run("searoom", "down")
        up.wait(60)
    finally:
        up.kill()
    eventually(lambda: bare.serve_status()["status"] == "absent", timeout_s=90, interval_s=1)
