"""What a run is, as data: every bound is checked where it is declared; no torch."""
