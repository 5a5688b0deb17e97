# SPDX-License-Identifier: MIT
"""Names of other libraries, a module for each: their arguments, this library's ops.

What a module does not serve it refuses by name. None imports the library it is named after.
"""
