"""The GPU twins of `penstock.kernels`: Triton, for CUDA and ROCm alike. Imported only where tensors lie on a GPU."""
