"""Imported by every Python that a test starts; see conftest."""

import network_wall

network_wall.build()
