"""Generation: sampling parameters, sampling, decoding, the engine, generate and stream, conversations."""
