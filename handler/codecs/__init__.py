"""Wire ↔ item, one modality a file."""
