"""The command `trl-ibtpo`."""
