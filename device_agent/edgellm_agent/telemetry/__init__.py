"""One record of how hot, how hungry and how fast the device is: taken by the sampler, read by many."""
