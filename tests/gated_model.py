"""A model of a server's tests, with the tensors of a text model: pieces come when the test lets them.

The prompt is a path. The first piece comes at once, the others when that file exists; a client that has gone makes the
file ``<path>.gone``. Runs in the server's process.
"""

import threading
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            prompt = pb.get_input_tensor_by_name(request, "text_input").as_numpy()[0].decode()
            count = int(pb.get_input_tensor_by_name(request, "max_tokens").as_numpy()[0])
            stream = pb.get_input_tensor_by_name(request, "stream")
            pieces = stream is not None and bool(stream.as_numpy()[0])
            words = (request.get_response_sender(), Path(prompt), count, pieces)
            threading.Thread(target=self.answer, args=words, daemon=True).start()

    def answer(self, sender, gate, count, pieces):
        if count < 1:
            code = pb.TritonError.UNAVAILABLE if count < 0 else pb.TritonError.INVALID_ARG
            error = pb.TritonError(f"max_tokens={count}. Expected: 1 or more. To do: ask for more.", code)
            sender.send(pb.InferenceResponse(error=error), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return
        for token in range(count):
            while token == 1 and not gate.exists():
                if sender.is_cancelled():
                    gate.with_name(gate.name + ".gone").touch()
                    return
                time.sleep(0.01)
            last = token == count - 1
            if pieces or last:
                made = range(token if pieces else 0, token + 1)
                flags = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
                sender.send(pb.InferenceResponse(self.piece(list(made), last, count)), flags=flags)

    def piece(self, tokens, last, count):
        values = {
            "text_output": np.array([" ".join(map(str, tokens)).encode() + b" "], np.object_),
            "token_ids": np.array(tokens, np.int32),
            "finish_reason": np.array([b"length" if last else b""], np.object_),
            "prompt_tokens": np.array([1], np.int32),
            "completion_tokens": np.array([tokens[-1] + 1], np.int32),
            "kept": np.array([0.5], np.float32),
        }
        return [pb.Tensor(name, value) for name, value in values.items()]
