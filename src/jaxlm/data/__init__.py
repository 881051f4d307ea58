"""From dataset rows to training batches: sources, formats, documents, the corpus on disk, packing."""
