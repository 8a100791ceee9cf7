"""The engine bundle: an OCI artifact with one digest on the build host, on the device and in a registry."""

from edgellm.bundle.config import EngineConfig
from edgellm.bundle.layout import Bundle, Variant
from edgellm.bundle.manifest import Descriptor, EngineManifest, Layer
from edgellm.bundle.writer import BundleWriter

__all__ = ["Bundle", "BundleWriter", "Descriptor", "EngineConfig", "EngineManifest", "Layer", "Variant"]
