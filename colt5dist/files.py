from colt5dist.data.files import fsync_path, write_whole
