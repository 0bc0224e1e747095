package vdisk

// Failed returns the failure of storage that ended the disk, or nil while it is
// well, and after Close. It is final: whoever runs the guest keeps it paused (design §4 Failure).
func (d *Disk) Failed() error {
	if dead := d.ext.dead.Load(); dead != nil && dead.Kind == ErrFailed {
		return dead
	}
	return nil
}
