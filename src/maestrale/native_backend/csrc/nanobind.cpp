// nanobind's own library, compiled into the module: setup.py names its folder.
#include <nb_combined.cpp>
