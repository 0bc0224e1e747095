# Drives a KMIP server with PyKMIP's client, the foreign client of the tests.
# usage: pykmip.py PORT CERT KEY CA VERSION; prints one line a step, exits 1 at
# the first that goes wrong.
import sys

from kmip.core import enums, objects
from kmip.core.factories.attributes import AttributeFactory
from kmip.pie import client as pie
from kmip.pie import exceptions, objects as pobjects

port, cert, key, ca, version = sys.argv[1:6]
V = getattr(enums.KMIPVersion, "KMIP_" + version.replace(".", "_"))
attributes = AttributeFactory()


def step(text, ok):
    print(text, "ok" if ok else "FAILED")
    if not ok:
        sys.exit(1)


def reason(f, *args):
    try:
        f(*args)
    except exceptions.KmipOperationFailure as e:
        return e.reason
    return None


def attribute(kind, value):
    return attributes.create_attribute(kind, value)


with pie.ProxyKmipClient(hostname="127.0.0.1", port=int(port), cert=cert, key=key, ca=ca,
                         ssl_version="PROTOCOL_TLSv1_2", kmip_version=V) as c:
    name = "pykmip-" + version
    uid = c.create(enums.CryptographicAlgorithm.AES, 256, name=name,
                   cryptographic_usage_mask=[enums.CryptographicUsageMask.ENCRYPT, enums.CryptographicUsageMask.DECRYPT])
    step("create", bool(uid))
    step("create of a taken name is refused",
         reason(c.create, enums.CryptographicAlgorithm.AES, 256, None, name) == enums.ResultReason.INVALID_FIELD)

    k = c.get(uid)
    step("get", isinstance(k, pobjects.SymmetricKey) and len(k.value) == 32 and k.cryptographic_length == 256)

    found = c.locate(attributes=[attribute(enums.AttributeType.NAME, name)])
    step("locate by name", found == [uid])
    found = c.locate(attributes=[attribute(enums.AttributeType.CRYPTOGRAPHIC_ALGORITHM, enums.CryptographicAlgorithm.AES),
                                 attribute(enums.AttributeType.STATE, enums.State.PRE_ACTIVE)])
    step("locate by state", uid in found)
    step("locate of nothing", c.locate(attributes=[attribute(enums.AttributeType.NAME, "none")]) == [])

    names = c.get_attribute_list(uid)
    step("get attribute list", {"Unique Identifier", "Name", "State", "Digest", "Initial Date"} <= set(names))
    got, attrs = c.get_attributes(uid, ["State", "Name", "Cryptographic Length"])
    values = {a.attribute_name.value: a.attribute_value for a in attrs}
    step("get attributes", got == uid and values["State"].value == enums.State.PRE_ACTIVE
         and values["Name"].name_value.value == name and values["Cryptographic Length"].value == 256)

    c.activate(uid)
    step("activate", c.get_attributes(uid, ["State"])[1][0].attribute_value.value == enums.State.ACTIVE)
    step("activate again is refused", reason(c.activate, uid) == enums.ResultReason.PERMISSION_DENIED)
    step("destroy while active is refused", reason(c.destroy, uid) == enums.ResultReason.PERMISSION_DENIED)
    c.revoke(enums.RevocationReasonCode.CESSATION_OF_OPERATION, uid, "done")
    step("revoke", c.get_attributes(uid, ["State"])[1][0].attribute_value.value == enums.State.DEACTIVATED)
    step("get while deactivated", c.get(uid).value == k.value)
    c.destroy(uid)
    step("destroy", reason(c.get, uid) == enums.ResultReason.ITEM_NOT_FOUND)

    own = pobjects.SymmetricKey(enums.CryptographicAlgorithm.AES, 128, b"\x11" * 16,
                                masks=[enums.CryptographicUsageMask.ENCRYPT], name=name + "-registered")
    uid = c.register(own)
    step("register", c.get(uid).value == b"\x11" * 16)
    word = c.register(pobjects.SecretData(b"secret word", enums.SecretDataType.PASSWORD,
                                          masks=[enums.CryptographicUsageMask.VERIFY], name=name + "-word"))
    step("register secret data", c.get(word).value == b"secret word")
    blob = c.register(pobjects.OpaqueObject(b"anything", enums.OpaqueDataType.NONE, name=name + "-blob"))
    step("register opaque object", c.get(blob).value == b"anything")
    if version != "1.0":
        c.revoke(enums.RevocationReasonCode.KEY_COMPROMISE, word, "seen")
        step("compromise", c.get_attributes(word, ["State"])[1][0].attribute_value.value == enums.State.COMPROMISED)
    step("an operation that is not there", reason(c.sign, b"x" * 16, uid) == enums.ResultReason.OPERATION_NOT_SUPPORTED)
