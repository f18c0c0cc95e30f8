"""The messages between processes: types, limits and encodings, without any sockets."""
