package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"

	"mortise/internal/hostapi"
	"mortise/test/guest"
)

// TestFirmwareVariablesAreEncrypted boots an EFI guest whose variables are in an
// encrypted file, seen by QEMU through the FUSE view of its vmx (E1). A variable
// that the guest sets is there after a power cycle and nowhere in clear.
func TestFirmwareVariablesAreEncrypted(t *testing.T) {
	t.Parallel()
	img, err := guest.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(img.Raw)
	if err != nil {
		t.Fatal(err)
	}
	h := startHost(t)
	vm, disk := uuid.NewString(), uuid.NewString()
	k1 := h.push("k1", vm)
	info, err := h.CreateVM(t.Context(), &hostapi.CreateVMRequest{
		Uuid: vm, Name: "efi1", Datastore: "ds1", Folder: "efi1", HomeKey: k1,
		Hardware: &hostapi.Hardware{MemoryMib: 384, Cpus: 1, Firmware: "efi"},
		Disks:    []*hostapi.NewDisk{{Uuid: disk, CapacityBytes: st.Size()}}, // E11: the disk may stay in clear
	})
	if err != nil {
		t.Fatal(err)
	}
	ref := info.Ref
	h.importRaw(ref, disk, img.Raw)
	boot := func() *guest.Agent {
		t.Helper()
		if _, err := h.PowerOn(t.Context(), &hostapi.PowerRequest{Ref: ref}); err != nil {
			t.Fatal(err)
		}
		g := h.console(ref)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		if err := g.Boot(ctx); err != nil {
			t.Fatalf("%v\n%s", err, g.Console())
		}
		return g
	}
	g := boot()
	if fw := h.do(g, "info").Values["firmware"]; fw != "efi" {
		t.Fatalf("the guest booted with %s", fw)
	}
	words := h.do(g, "nvram write").Words
	marker := words[len(words)-1]
	for _, w := range words {
		if len(w) == 64 {
			marker = w
		}
	}
	if _, err := h.PowerOff(t.Context(), &hostapi.PowerRequest{Ref: ref}); err != nil {
		t.Fatal(err)
	}
	nvram := filepath.Join(h.dir, "ds", "efi1", "efi1.nvram")
	if st, err := os.Stat(nvram); err != nil || st.Size() < 64<<10 {
		t.Fatalf("no variables on the datastore: %v", err)
	}
	// OVMF's variable store begins with this GUID's bytes in clear: "_FVH" stands
	// in every firmware volume.
	for _, needle := range []string{marker, "_FVH"} {
		if exec.Command("grep", "-qaF", needle, nvram).Run() == nil {
			t.Errorf("%q is in %s in clear", needle, nvram)
		}
	}
	g = boot()
	h.do(g, "nvram read "+marker)
	if _, err := h.PowerOff(t.Context(), &hostapi.PowerRequest{Ref: ref}); err != nil {
		t.Fatal(err)
	}
	if left, err := h.DeleteVM(t.Context(), &hostapi.PowerRequest{Ref: ref}); err != nil || len(left.LeftBehind) > 0 {
		t.Errorf("delete: %v, left %v", err, left.GetLeftBehind())
	}
}
