"""What can be wrong with a trajectory data set."""


class DatasetError(ValueError):
    """A trajectory data set that cannot be used. The message names the file and the way out."""


class SettingsDiffer(DatasetError):
    """Shards made with other settings are in the way: they are neither mixed with nor silently replaced."""
