"""The model graph: written once over a small vocabulary of operations, spoken in the dialect of a runtime."""
