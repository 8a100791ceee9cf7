"""Takes an engine out of its bundle for other programs: as plain files, or as a Triton model repository."""

from edgellm.export.directory import export_directory
from edgellm.export.triton import TritonExport, export_triton
from edgellm.export.triton_config import ServingOptions

__all__ = ["ServingOptions", "TritonExport", "export_directory", "export_triton"]
