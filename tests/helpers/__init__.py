"""What tests of several folders share: small models and files, stand-ins for the hub, pairs of processes."""
