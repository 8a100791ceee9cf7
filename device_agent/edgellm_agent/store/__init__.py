"""The blob store: content by digest, resumable, visible only once it is whole and its digest is right."""

from edgellm_agent.store.blobs import Store
from edgellm_agent.store.disk import StoreError
from edgellm_agent.store.ingest import Ingest
from edgellm_agent.store.settings import StoreSettings

__all__ = ["Ingest", "Store", "StoreError", "StoreSettings"]
