"""The page table of a decode batch, made on the device."""
