// Changes whenever the signature of a kernel does; the Python side refuses a library of another version.
extern "C" int penstock_kernels_version() { return 11; }
