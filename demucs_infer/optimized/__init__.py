"""A loaded network in its fast form: the same answers, to a stated tolerance."""
