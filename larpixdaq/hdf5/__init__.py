"""LArPix+HDF5 files: written block by block, read back, verified. h5py is used in this package only."""
