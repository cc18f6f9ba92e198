#%Module1.0
proc ModulesHelp { } {
    puts stderr "Penstock: serves, batches, farms and measures language models. `penstock --help` lists its commands."
}
module-whatis "Penstock: a model name into text on any machine"
conflict penstock
# PREFIX/modulefiles/penstock/VERSION: found from where this file is, so that the tree may be moved
set root [file dirname [file dirname [file dirname [file normalize $ModulesCurrentModulefile]]]]
prepend-path PATH $root/bin
setenv PENSTOCK_PREFIX $root
