"""Encrypts with OpenSSL's AES-256-XTS (openssl enc refuses XTS, libcrypto does not).

Reads lines of three hexadecimal fields, key, tweak and data unit, and writes the
encrypted data unit of each as a line.
"""
import sys

from cryptography.hazmat.backends import default_backend
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

for line in sys.stdin:
    key, tweak, unit = (bytes.fromhex(field) for field in line.split())
    encryptor = Cipher(algorithms.AES(key), modes.XTS(tweak), default_backend()).encryptor()
    print((encryptor.update(unit) + encryptor.finalize()).hex())
