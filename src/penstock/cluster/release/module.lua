help([[Penstock: serves, batches, farms and measures language models. `penstock --help` lists its commands.]])
whatis("Name: penstock")
whatis("Description: a model name into text on any machine")
conflict("penstock")
-- PREFIX/modulefiles/penstock/VERSION.lua: found from where this file is, so that the tree may be moved
local root = myFileName():gsub("/modulefiles/penstock/[^/]*$", "")
prepend_path("PATH", pathJoin(root, "bin"))
setenv("PENSTOCK_PREFIX", root)
