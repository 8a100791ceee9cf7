"""Whose engines this device takes: keys, signatures, releases."""
