"""Will it fit, and how fast is it: measurements (`jaxlm bench`), predictions (`jaxlm plan`) and the hardware matrix
(`jaxlm check`)."""
