"""Hub ids, against a server on the loopback that answers as the hub does: what is fetched, the cache, the offline switch."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import load_file

from latentdiff.checkpoints import hub
from latentdiff.checkpoints.files import CheckpointError, open_tensors, write_safetensors

COMMIT = "a" * 40


@pytest.fixture
def server(folder, tmp_path):
    """Serves one repository, `owner/name`; `.seen` are the requests; `.says` is the status of all answers, where it is set."""
    root = tmp_path / "repository"
    import shutil

    shutil.copytree(folder("sd15"), root)
    (root / "unet" / "flax_model.msgpack").write_bytes(b"unused")
    (root / "v1-5-pruned.safetensors").write_bytes(b"unused")
    (root / "safety_checker").mkdir()
    (root / "safety_checker" / "model.safetensors").write_bytes(b"unused")
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = open_tensors(root / part / f"{name}.safetensors")
        write_safetensors(root / part / f"{name}.fp16.safetensors", {n: file.get(n).half() for n in file.entries})
        (root / part / f"{name}.bin").write_bytes(b"unused")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool):
            path = unquote(urlsplit(self.path).path)
            httpd.seen.append(path)
            prefix = f"/owner/name/resolve/{COMMIT}/"
            names = {str(p.relative_to(root)): p.stat().st_size for p in root.rglob("*") if p.is_file()}
            if httpd.says:
                self.reply(httpd.says, b"{}", {}, body)
            elif path.startswith("/api/models/owner/name/tree/"):
                self.reply_json([{"type": "file", "path": n, "size": size, "oid": "0" * 40} for n, size in names.items()], body)
            elif path.startswith("/api/models/owner/name"):
                siblings = [{"rfilename": name} for name in names]
                self.reply_json({"id": "owner/name", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}, body)
            elif path.startswith(prefix) and (root / path.removeprefix(prefix)).is_file():
                content = (root / path.removeprefix(prefix)).read_bytes()
                etag = hashlib.sha256(content).hexdigest()
                self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, body)
            else:
                self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, body)

        def reply_json(self, data, body: bool):
            self.reply(200, json.dumps(data).encode(), {"Content-Type": "application/json"}, body)

        def reply(self, status: int, content: bytes, headers: dict[str, str], body: bool):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def pickle(name: str, to: str) -> None:
        """The part in the field's older format, and in no other."""
        tensors = load_file(root / name)
        for file in (root / name).parent.glob("*model*"):
            file.unlink()
        torch.save(tensors, root / to)

    httpd.pickle = pickle
    httpd.seen, httpd.says = [], None
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def load(server, home: Path, name: str = "owner/name", *, expect: str | None = None, options: str = "", **environment: str):
    """Load in a new process, whose hub is the server and whose cache is `home`."""
    program = f"""if True:
        from latentdiff.checkpoints.io import load_parts
        parts = load_parts({name!r}{options})
        print("LOADED", parts.spec.prediction, parts.unet.conv_in.weight.dtype, parts.title)
    """
    port = server.server_address[1]
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    if expect is not None:
        assert expect in result.stderr, result.stderr
        assert result.returncode == 1
    else:
        assert result.returncode == 0, result.stderr
    return result.stdout


def fetched(server) -> set[str]:
    prefix = f"/owner/name/resolve/{COMMIT}/"
    return {path.removeprefix(prefix) for path in server.seen if path.startswith(prefix)}


def test_a_hub_id_is_fetched_once_and_then_found_in_the_cache(server, tmp_path):
    assert "LOADED eps torch.float32" in load(server, tmp_path / "home")
    weights = {f for f in fetched(server) if f.endswith((".safetensors", ".bin", ".msgpack"))}
    assert weights == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    server.seen.clear()
    assert "LOADED" in load(server, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert not server.seen
    server.says = 403  # gated by now
    assert "LOADED" in load(server, tmp_path / "home")
    load(server, tmp_path / "other", expect="CheckpointError: owner/name: the hub says: ")
    server.shutdown()
    server.server_close()
    assert "LOADED" in load(server, tmp_path / "home")  # out of reach: the cache again


def test_a_variant_is_all_that_is_fetched_of_the_weights(server, tmp_path):
    assert "LOADED eps torch.float16" in load(server, tmp_path / "home", options=", variant='fp16'")
    assert all(".fp16." in f for f in fetched(server) if f.endswith(".safetensors"))


def test_unknown_ids_and_empty_caches_are_named(server, tmp_path):
    load(server, tmp_path / "home", "owner/other", expect="CheckpointError: owner/other: the hub says")
    load(server, tmp_path / "home", expect="FileNotFoundError: owner/name: not in the cache", HF_HUB_OFFLINE="1")
    server.seen.clear()
    server.says = 503
    load(server, tmp_path / "home", expect="FileNotFoundError: owner/name: not in the cache")
    assert [path for path in server.seen if "owner" in path] == ["/api/models/owner/name"]  # asked once, not again and again


@pytest.mark.parametrize("text", ["owner/name", "stabilityai/sd-turbo", "a/b.c", "runwayml/stable_diffusion-v1.5"])
def test_ids(text):
    assert hub.is_id(text)


@pytest.mark.parametrize(
    "text", ["name", "./a/b", "/a/b", "a/b/c", "a/b.safetensors", "a/b.ckpt", "../b", "a/", "http://a/b", "~/b"]
)
def test_paths_are_no_ids(text):
    assert not hub.is_id(text)


FILES = [
    "model_index.json", "README.md", "a.safetensors", "evil.py", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
    "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin", "unet/config.json",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors", "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json", "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json", "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors", "safety_checker/model.safetensors",
    "vae_1_0/config.json", "vae_1_0/diffusion_pytorch_model.safetensors", "text_encoder/openvino_model.xml", "unet/model.onnx",
]  # fmt: skip


@pytest.mark.parametrize(("variant", "unet"), [(None, ["-00001-of-00002", "-00002-of-00002"]), ("fp16", [".fp16-00001-of-00001"])])
def test_what_is_needed_of_a_repository(variant, unet):
    needed = set(hub.needed("owner/name", FILES, variant))
    assert {f for f in needed if f.startswith("unet/diff") and f.endswith("rs")} == {
        f"unet/diffusion_pytorch_model{end}.safetensors" for end in unet
    }
    assert ("unet/diffusion_pytorch_model.safetensors.index.json" in needed) == (variant is None)
    assert ("unet/diffusion_pytorch_model.safetensors.index.fp16.json" in needed) == (variant == "fp16")
    assert ("text_encoder/model.safetensors" in needed) == (variant is None)
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in needed  # all that there is
    assert not needed & {
        "README.md",
        "a.safetensors",
        "evil.py",
        "text_encoder/pytorch_model.bin",
        "safety_checker/model.safetensors",
        "vae_1_0/config.json",
        "vae_1_0/diffusion_pytorch_model.safetensors",
    }
    assert not any("openvino" in f or "onnx" in f for f in needed)
    assert {"model_index.json", "tokenizer/merges.txt", "tokenizer/vocab.json", "scheduler/scheduler_config.json"} <= needed


def test_a_bare_autoencoder_repository():
    files = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "taesd_decoder.safetensors"]
    assert set(hub.needed("owner/name", files, None)) == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_pickles_are_taken_only_where_there_is_nothing_else_and_on_demand():
    files = ["unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin"]
    files += ["text_encoder/pytorch_model.fp16.bin", "text_encoder/pytorch_model-00001-of-00001.bin", "safety_checker/model.bin"]
    files += ["text_encoder/pytorch_model.bin.index.json"]
    with pytest.raises(CheckpointError, match=r"owner/name: of vae there is only a pickle \(\.bin\).* allow_pickle=True"):
        hub.needed("owner/name", files, None)
    assert set(hub.needed("owner/name", files, None, allow_pickle=True)) == {files[0], files[2], files[4], files[6]}
    assert set(hub.needed("owner/name", files, "fp16", allow_pickle=True)) == {files[0], files[2], files[3]}


def test_a_repository_of_pickles(server, tmp_path):
    server.pickle("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin")
    load(server, tmp_path / "home", expect="CheckpointError: owner/name: of text_encoder there is only a pickle")
    assert "LOADED eps torch.float32" in load(server, tmp_path / "home", options=", allow_pickle=True")


def test_of_another_vaes_repository_only_that_is_fetched(server, folder, tmp_path):
    """So what else is there may be in the older format; the autoencoder itself may not."""
    model, options = str(folder("sd15")), ", vae='owner/name'"
    server.pickle("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin")
    assert "LOADED" in load(server, tmp_path / "home", model, options=options)
    assert fetched(server) == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert "LOADED" in load(server, tmp_path / "home", model, options=options, HF_HUB_OFFLINE="1")
    server.pickle("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin")
    load(server, tmp_path / "other", model, options=options, expect="CheckpointError: owner/name: of vae there is only a pickle")
    assert "LOADED" in load(server, tmp_path / "other", model, options=f"{options}, allow_pickle=True")


def test_a_vae_is_fetched_from_where_it_is_looked_for():
    bare = ["config.json", "diffusion_pytorch_model.safetensors"]
    model = [f"{part}/{file}" for part in ("unet", "vae") for file in bare] + ["model_index.json", "text_encoder/model.bin"]
    assert set(hub.needed("owner/name", model, None, vae=True)) == {f"vae/{file}" for file in bare}
    assert set(hub.needed("owner/name", [*bare, *model[:4]], None, vae=True)) == {*bare}


def test_a_vae_that_another_stands_for_is_not_fetched(server, folder, tmp_path):
    """So it may be in the older format."""
    server.pickle("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin")
    assert "LOADED" in load(server, tmp_path / "home", options=f", vae={str(folder('sd15'))!r}")
    assert not [file for file in fetched(server) if file.startswith("vae/diffusion")]
    assert "LOADED" in load(server, tmp_path / "home", options=f", vae={str(folder('sd15'))!r}", HF_HUB_OFFLINE="1")
    load(server, tmp_path / "other", expect="CheckpointError: owner/name: of vae there is only a pickle")


def test_a_pickle_at_a_models_root_is_not_asked_for():
    files = ["model_index.json", "pytorch_model.bin", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert set(hub.needed("owner/name", files, None)) == {*files} - {"pytorch_model.bin"}
