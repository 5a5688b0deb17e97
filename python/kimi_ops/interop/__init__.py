# SPDX-License-Identifier: MIT
"""Ways into other libraries, a module each; every module imports its library when it is used."""
