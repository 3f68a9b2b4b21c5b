"""transformers with NVIDIA's kvpress (Apache-2.0), in a process of its own because kvpress pins an older transformers.

``Worker`` starts this file in the environment that ``make kvpress`` makes, and asks it. One JSON object is one line:
``{"call": name, ...arguments}`` in, ``{"result": ...}`` or ``{"error": text}`` out. Calls: methods of ``Session``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trtpass.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-kvpress"
Memory = dict[str, int | None]


def python() -> Path:
    """The interpreter of the environment that has kvpress.

    Raises:
        InputError: the environment is not there, or only half made.
    """
    if not (ENVIRONMENT / ".installed").is_file():
        raise InputError(
            f"there is no kvpress in {ENVIRONMENT}", "an environment with kvpress and its transformers", "make kvpress"
        )
    return ENVIRONMENT / "bin" / "python"


class Worker:
    """A process that answers calls, one at a time; to be closed, or used in ``with``.

    Args:
        file: the Python file that it runs, this one if not given.
    """

    def __init__(self, file: Path = Path(__file__)) -> None:
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close
        self._process = subprocess.Popen(
            [str(python()), "-P", str(file)],  # -P: the modules beside this file are no packages of the process
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    def ask(self, call: str, **arguments: Any) -> Any:
        """The result of a call.

        Raises:
            InputError: the call raised there, with its words; or the process ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise InputError("the kvpress process has no pipes")
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps({"call": call, **arguments}) + "\n")
            stdin.flush()
        line = stdout.readline()
        if not line:
            self._words.seek(0)
            last = " ".join(self._words.read().split())[-600:]
            raise InputError(f"the kvpress process ended (exit code {self._process.wait()}) in '{call}': {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(f"kvpress, {call}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._words.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(calls: Mapping[str, Callable[..., Any]]) -> None:
    """Answer the lines of standard input until it ends; whatever else prints goes to standard error."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = {"result": calls[request.pop("call")](**request)}
            except Exception as error:  # noqa: BLE001 - the other side raises it
                answer = {"error": f"{type(error).__name__}: {error}"}
            out.write(json.dumps(answer) + "\n")
            out.flush()


def load_model(folder: str, attention: str = "sdpa") -> Any:
    """The model of a Hugging Face folder with safetensors, float32, eval mode."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=attention,
        local_files_only=True,
        use_safetensors=True,
    )
    return model.eval()


@contextlib.contextmanager
def pressed(model: Any, checkpoint: str, threshold: float, window: int, decoding: bool = True) -> Iterator[Any]:
    """``model`` under kvpress's threshold press over KVzap, for as long as the context lasts.

    Args:
        model: as ``load_model`` gives it.
        checkpoint: folder that ``Surrogate.save`` or kvpress's own ``save_pretrained`` wrote.
        threshold: keys of a lower score are masked.
        window: the last keys that are never masked, in tokens.
        decoding: keys that decoding adds are judged, too.
    """
    from kvpress import DMSPress, KVzapPress  # type: ignore[import-not-found]

    kind = "linear" if json.loads(Path(checkpoint, "config.json").read_text()).get("hidden_dim") is None else "mlp"
    press = DMSPress(KVzapPress(model_type=kind), threshold, sliding_window_size=window, decoding=decoding)
    # kvpress knows its checkpoints by names that it makes of the model's: a folder of that name comes first
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()), "nvidia")
        folder.mkdir()
        name = f"KVzap-{kind}-{model.config.name_or_path.split('/')[-1]}"
        (folder / name).symlink_to(Path(checkpoint).resolve(), target_is_directory=True)
        with contextlib.chdir(folder.parent):
            stack.enter_context(press(model))
        yield press


def memory() -> Memory:
    """Bytes of this process: ``resident`` now and ``peak`` since the last call; None where the system does not say."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.is_file() else ""
    found = {key: re.search(rf"^{name}:\s+(\d+) kB", text, re.M) for key, name in _STATUS.items()}
    with contextlib.suppress(OSError):  # not allowed everywhere: then it is the peak since the start
        Path("/proc/self/clear_refs").write_text("5")
    return {key: int(match[1]) << 10 if match else None for key, match in found.items()}


_STATUS = {"resident": "VmRSS", "peak": "VmHWM"}


class Session:
    """One model, and one row of tokens in its cache: the calls of the benchmark."""

    def __init__(self) -> None:
        self.model: Any = None
        self.cache: Any = None
        self.next: Any = None  # the token to decode [1, 1]
        self.press = contextlib.ExitStack()
        self.now = time.perf_counter

    def load(self, model: str, threads: int, clock: str = "wall") -> dict[str, Any]:
        """Load a folder; versions of what runs, and its ``memory``. ``clock``: of ``trtpass.bench.measure``."""
        import kvpress  # noqa: F401 - it changes the attention functions of transformers, with or without a press
        import torch
        import transformers

        from trtpass.bench.measure import CLOCKS

        self.now = CLOCKS[clock]
        torch.set_num_threads(threads)
        self.model = load_model(model)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {**versions, "threads": threads, "memory": memory()}

    def prefill(
        self,
        tokens: Sequence[int],
        checkpoint: str | None = None,
        threshold: float = 0.0,
        window: int = 128,
        decoding: bool = True,
    ) -> dict[str, Any]:
        """A new row; without a checkpoint plain transformers, every key visible. As ``state``, and ``seconds``."""
        import torch
        import transformers

        self.press.close()
        self.cache = transformers.DynamicCache()
        if checkpoint is not None:
            self.press.enter_context(pressed(self.model, checkpoint, threshold, window, decoding))
        started = self.now()
        with torch.inference_mode():
            states = self.model.model(input_ids=torch.tensor([list(tokens)]), past_key_values=self.cache)
            self.next = self.model.lm_head(states.last_hidden_state[:, -1:]).argmax(-1)
        return {"seconds": self.now() - started, **self.state()}

    def decode(self, count: int) -> dict[str, Any]:
        """Greedy tokens. As ``state``, ``seconds`` of each token, and the tokens (those that went in)."""
        import torch

        seconds, tokens = [], []
        with torch.inference_mode():
            for _ in range(count):
                tokens.append(int(self.next))
                started = self.now()
                made = self.model(input_ids=self.next, past_key_values=self.cache)
                self.next = made.logits[:, -1:].argmax(-1)
                seconds.append(self.now() - started)
        return {"seconds": seconds, "tokens": tokens, **self.state()}

    def state(self) -> dict[str, Any]:
        """``context`` tokens, ``cache_bytes`` allocated, ``masked`` fraction of all keys, and ``memory``."""
        layers = self.cache.layers
        blocks = [layer.self_attn for layer in self.model.model.layers]
        masked = sum(len(found[0]) for b in blocks if (found := getattr(b, "masked_key_indices", None)) is not None)
        keys = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in layers)
        return {
            "context": layers[0].keys.shape[2],
            "cache_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
            "masked": masked / keys,
            "memory": memory(),
        }


if __name__ == "__main__":
    session = Session()
    serve({"load": session.load, "prefill": session.prefill, "decode": session.decode})
