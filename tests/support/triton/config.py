"""Reads a config.pbtxt with protobuf's own parser, against the fields of Triton's ModelConfig that we write.

The names and kinds of fields are those of Triton's user guide, "Model Configuration" and "Batchers"; their
numbers, which the text format does not have, are made up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "string": _Field.TYPE_STRING,
    "bool": _Field.TYPE_BOOL,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
}
_ENUMS = {
    "DataType": ("TYPE_INVALID", "TYPE_STRING", "TYPE_INT32", "TYPE_INT64", "TYPE_FP32"),
    "Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
}
# "*": repeated.
_MESSAGES: dict[str, dict[str, str]] = {
    "ModelConfig": {
        "name": "string",
        "backend": "string",
        "max_batch_size": "int32",
        "model_transaction_policy": "TransactionPolicy",
        "input": "*ModelInput",
        "output": "*ModelOutput",
        "dynamic_batching": "DynamicBatching",
        "instance_group": "*InstanceGroup",
        "version_policy": "VersionPolicy",
        "parameters": "*ParametersEntry",
    },
    "TransactionPolicy": {"decoupled": "bool"},
    "ModelInput": {
        "name": "string",
        "data_type": "DataType",
        "dims": "*int64",
        "optional": "bool",
        "allow_ragged_batch": "bool",
    },
    "ModelOutput": {"name": "string", "data_type": "DataType", "dims": "*int64"},
    "DynamicBatching": {
        "preferred_batch_size": "*int32",
        "max_queue_delay_microseconds": "uint64",
        "default_queue_policy": "QueuePolicy",
    },
    "QueuePolicy": {"max_queue_size": "uint32"},
    "InstanceGroup": {"count": "int32", "kind": "Kind"},
    "VersionPolicy": {"latest": "Latest"},
    "Latest": {"num_versions": "uint32"},
    "ParametersEntry": {"key": "string", "value": "ModelParameter"},
    "ModelParameter": {"string_value": "string"},
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="triton_model_config.proto", package="t", syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (title, kind) in enumerate(fields.items(), start=1):
            field = message.field.add(name=title, number=number)
            field.label = _Field.LABEL_REPEATED if kind[0] == "*" else _Field.LABEL_OPTIONAL
            one = kind.removeprefix("*")
            if one in _SCALARS:
                field.type = _SCALARS[one]
            else:
                field.type = _Field.TYPE_ENUM if one in _ENUMS else _Field.TYPE_MESSAGE
                field.type_name = f".t.{one}"
    return file


def read_config(path: Path) -> dict[str, Any]:
    """The configuration as the JSON that a model gets; raises ParseError for a field that there is not."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))
    parsed = text_format.Parse(path.read_text(encoding="utf-8"), kind())
    config: dict[str, Any] = json_format.MessageToDict(
        parsed, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    # A map on the wire is a list of entries; in JSON it is an object.
    config["parameters"] = {entry["key"]: entry["value"] for entry in config["parameters"]}
    return config
