package store

// Health is how this member's etcd stands, as it sees itself.
type Health struct {
	Leader    bool   // it leads
	HasLeader bool   // some member does, and this one is not cut off from the majority
	Members   int    // of the cluster, learners too
	Committed uint64 // index in raft's log up to which all is decided
	Applied   uint64 // and up to which this member has it
	Size      int64  // bytes of the database's file
	InUse     int64
	Quota     int64
}

// Health asks nobody and does not wait.
func (s *Store) Health() Health {
	b, self := s.etcd.Server.Backend(), s.etcd.Server
	return Health{
		Leader:    uint64(self.Leader()) == uint64(self.MemberID()),
		HasLeader: self.Leader() != 0 && s.Led(),
		Members:   len(self.Cluster().Members()),
		Committed: self.CommittedIndex(), Applied: self.AppliedIndex(),
		Size: b.Size(), InUse: b.SizeInUse(), Quota: s.quota,
	}
}
