package kms

// RecordFormat is the highest format of records that this program reads and
// writes. It is raised with each change that an older program could not read;
// that change writes the old form while WriteFormat is lower.
const RecordFormat = 1

// SetFormat says that every member of the cluster reads records of that format
// (design §1). It only rises.
func (k *KMS) SetFormat(f int) {
	for {
		now := k.format.Load()
		if int32(f) <= now || k.format.CompareAndSwap(now, int32(f)) {
			return
		}
	}
}

// WriteFormat is the format to write records in: what every member reads.
func (k *KMS) WriteFormat() int { return max(1, min(RecordFormat, int(k.format.Load()))) }
