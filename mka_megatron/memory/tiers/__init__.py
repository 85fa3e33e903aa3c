"""Where L3's pages live: on the device, in host memory, on an SSD."""
