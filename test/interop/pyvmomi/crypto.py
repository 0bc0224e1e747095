"""Encrypts, recrypts and decrypts a VM with pyVmomi's CryptoSpecs, and shows that
an account without the cryptographic privileges cannot."""

import os
import ssl
import sys

from pyVim.connect import SmartConnect
from pyVim.task import WaitForTask
from pyVmomi import vim

NAME, LIMITED, LIMITED_PASSWORD = sys.argv[1:4]


def connect(user, password):
    return SmartConnect(host=os.environ["VI_HOST"], port=int(os.environ["VI_PORT"]), user=user, pwd=password,
                        sslContext=ssl._create_unverified_context())


def find(si):
    content = si.RetrieveContent()
    return content, content.searchIndex.FindByInventoryPath("Datacenter/vm/" + NAME)


def disk(vm):
    return [d for d in vm.config.hardware.device if isinstance(d, vim.vm.device.VirtualDisk)][0]


def new_key():
    return vim.encryption.CryptoKeyId(keyId="", providerId=vim.encryption.KeyProviderId(id="kms"))


def reconfigure(vm, crypto):
    """The VM files by the spec's crypto, the disk by its backing's."""
    change = vim.vm.device.VirtualDeviceSpec(
        operation="edit", device=disk(vm), backing=vim.vm.device.VirtualDeviceSpec.BackingSpec(crypto=crypto))
    WaitForTask(vm.ReconfigVM_Task(vim.vm.ConfigSpec(crypto=crypto, deviceChange=[change])))


def main():
    si = connect(os.environ["VI_USER"], os.environ["VI_PASSWORD"])
    content, vm = find(si)
    providers = content.cryptoManager.ListKmipServers(None)
    assert [p.clusterId.id for p in providers] == ["kms"], providers
    assert content.cryptoManager.kmipServers[0].clusterId.id == "kms"

    reconfigure(vm, vim.encryption.CryptoSpecEncrypt(cryptoKeyId=new_key()))
    first = vm.config.keyId.keyId
    assert first and disk(vm).backing.keyId.keyId, vm.config.keyId
    assert vm.config.keyId.providerId.id == "kms"
    assert vm.runtime.cryptoState == "unlocked", vm.runtime.cryptoState
    assert vm.config.migrateEncryption == "required"
    print("encrypted with", first)

    reconfigure(vm, vim.encryption.CryptoSpecShallowRecrypt(newKeyId=new_key()))
    assert vm.config.keyId.keyId != first
    reconfigure(vm, vim.encryption.CryptoSpecDeepRecrypt(newKeyId=new_key()))
    print("recrypted")

    # Somebody who is no cryptography administrator.
    _, other = find(connect(LIMITED, LIMITED_PASSWORD))
    try:
        reconfigure(other, vim.encryption.CryptoSpecDecrypt())
    except vim.fault.NoPermission as e:
        assert e.privilegeId.startswith("Cryptographer."), e
        print("denied:", e.privilegeId, "-", e.msg)
    else:
        raise SystemExit("decrypted without the privilege")

    reconfigure(vm, vim.encryption.CryptoSpecDecrypt())
    assert vm.config.keyId is None and disk(vm).backing.keyId is None
    assert not vm.runtime.cryptoState
    print("decrypted")


main()
