package host

import (
	"context"

	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
	"mortise/internal/secret"
)

// PushKeys implements hostapi.HostServer.
func (s *Server) PushKeys(_ context.Context, r *hostapi.PushKeysRequest) (*hostapi.PushKeysReply, error) {
	defer clearKeys(r.Keys)
	if err := s.agent.obey(r.Header); err != nil {
		return nil, err
	}
	for _, k := range r.Keys {
		if len(k.Bytes) != keysafe.KEKSize || k.Id.GetProvider() == "" || k.Id.GetKey() == "" {
			return nil, hostapi.Faultf(hostapi.Fault_INVALID, "key %s/%s has %d bytes: a KEK has %d, a provider and an id", k.Id.GetProvider(), k.Id.GetKey(), len(k.Bytes), keysafe.KEKSize)
		}
		key, err := secret.Take(k.Bytes)
		if err != nil {
			return nil, err
		}
		s.agent.keys.put(fromWire(k.Id), key, k.VmUuids...)
		s.agent.log.Info("key received", "provider", k.Id.Provider, "key", k.Id.Key, "vms", k.VmUuids)
		for _, vm := range k.VmUuids {
			if m := s.agent.held(vm); m != nil {
				m.wake() // it may have waited for this key
				s.agent.drop(m)
			}
		}
	}
	return &hostapi.PushKeysReply{}, nil
}

// RemoveKeys implements hostapi.HostServer.
func (s *Server) RemoveKeys(_ context.Context, r *hostapi.RemoveKeysRequest) (*hostapi.RemoveKeysReply, error) {
	if err := s.agent.obey(r.Header); err != nil {
		return nil, err
	}
	reply := &hostapi.RemoveKeysReply{}
	for _, k := range r.Keys {
		id := fromWire(k)
		if r.VmUuid == "" {
			users := s.agent.keys.evict(id)
			s.agent.log.Info("key evicted", "provider", id.Provider, "key", id.Key, "vms", users)
			continue
		}
		if wiped := s.agent.keys.dropVM(r.VmUuid, id); len(wiped) > 0 {
			s.agent.log.Info("key wiped", "provider", id.Provider, "key", id.Key)
		} else if s.agent.keys.holds(id) {
			reply.StillUsed = append(reply.StillUsed, k)
		}
	}
	return reply, nil
}

// ListKeys implements hostapi.HostServer.
func (s *Server) ListKeys(context.Context, *hostapi.ListKeysRequest) (*hostapi.ListKeysReply, error) {
	reply := &hostapi.ListKeysReply{}
	for _, u := range s.agent.keys.list() {
		reply.Keys = append(reply.Keys, &hostapi.HeldKey{Id: toWire(u.ID), VmUuids: u.VMs, SinceUnix: u.Since.Unix()})
	}
	return reply, nil
}
