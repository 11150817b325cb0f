"""How ranks find each other and talk: one small interface, one file for each kind."""
