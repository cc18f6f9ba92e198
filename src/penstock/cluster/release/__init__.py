"""Releases: everything that a machine without internet needs, in one folder that was checked before it is shipped."""
