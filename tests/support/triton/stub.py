"""Runs one exported version as the stub process of Triton's Python backend does: `stub.py VERSION CONFIG`.

Commands come as lines of JSON on standard input, responses go out as lines of JSON. `execute` runs in a
thread of its own, one call after the other. Nothing of edgellm can be imported here.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import triton_python_backend_utils as pb_utils

DTYPES = {"TYPE_STRING": np.object_, "TYPE_INT64": np.int64, "TYPE_INT32": np.int32, "TYPE_FP32": np.float32}


class NothingOfOurs:
    """Finds nothing for our packages, as on a machine that has only Triton."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0].startswith("edgellm"):
            raise ModuleNotFoundError(f"{name} is not installed beside Triton")


class Stub:
    def __init__(self, version: Path, config: dict) -> None:
        self.config, self.senders, self.out = config, {}, threading.Lock()
        sys.path.append(str(version))
        import model

        self.model = model.TritonPythonModel()
        self.batches: queue.Queue[list | None] = queue.Queue()
        arguments = {
            "model_config": json.dumps(config),
            "model_instance_kind": config["instance_group"][0]["kind"].removeprefix("KIND_"),
            "model_instance_device_id": "0",
            "model_repository": str(version.parent),
            "model_version": version.name,
            "model_name": config["name"],
        }
        self.model.initialize(arguments)

    def emit(self, **event: object) -> None:
        with self.out:
            print(json.dumps(event), flush=True)

    def execute(self) -> None:
        while (batch := self.batches.get()) is not None:
            result = self.model.execute(batch)
            assert result is None, "a decoupled model returns nothing"
            self.emit(begun=[request.request_id() for request in batch])

    def request(self, said: dict) -> pb_utils.InferenceRequest:
        sender = pb_utils.InferenceResponseSender(lambda *sent: self.deliver(said["id"], *sent))
        self.senders[said["id"]] = sender
        inputs = [self.tensor(name, values) for name, values in said["inputs"].items()]
        return pb_utils.InferenceRequest(said["id"], inputs, sender)

    def tensor(self, name: str, values: list) -> pb_utils.Tensor:
        (declared,) = [item for item in self.config["input"] if item["name"] == name]
        if declared["data_type"] == "TYPE_STRING":
            values = [[text.encode("utf-8", "surrogateescape") for text in row] for row in values]
        return pb_utils.Tensor(name, np.array(values, DTYPES[declared["data_type"]]))

    def deliver(self, request_id: str, response: pb_utils.InferenceResponse | None, final: bool) -> None:
        event: dict[str, object] = {"id": request_id, "final": final}
        if response is not None and response.has_error():
            event |= {"error": response.error().message(), "code": response.error().code()}
        elif response is not None:
            event |= {tensor.name(): self.checked(tensor) for tensor in response.output_tensors()}
        self.emit(**event)

    def checked(self, tensor: pb_utils.Tensor) -> object:
        """The value of an output that is as config.pbtxt declares it, behind the dimension of the batch."""
        (declared,) = [item for item in self.config["output"] if item["name"] == tensor.name()]
        array = tensor.as_numpy()
        assert list(array.shape) == [1, *(int(dim) for dim in declared["dims"])], array.shape
        assert array.dtype == DTYPES[declared["data_type"]], array.dtype
        value = array.item()
        return value.decode() if isinstance(value, bytes) else value


def main() -> None:
    sys.meta_path.insert(0, NothingOfOurs())
    try:
        stub = Stub(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except Exception as error:  # noqa: BLE001 - whatever it is, the server says it
        print(json.dumps({"failed": str(error)}), flush=True)
        return
    worker = threading.Thread(target=stub.execute)
    worker.start()
    stub.emit(ready=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "execute" in command:
            stub.batches.put([stub.request(said) for said in command["execute"]])
        elif "cancel" in command:
            stub.senders[command["cancel"]].cancelled = True
        else:
            break
    stub.model.finalize()
    stub.batches.put(None)
    worker.join()
    ours = [name for name in sys.modules if name.startswith("edgellm")]
    stub.emit(finalized=True, ours=ours, warned=pb_utils.Logger.lines)


if __name__ == "__main__":
    main()
