package host

import (
	"context"
	"io"

	"mortise/internal/hostapi"
)

// ImportDisk implements hostapi.HostServer.
func (s *Server) ImportDisk(stream hostapi.Host_ImportDiskServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	reply, err := s.importDisk(first, stream)
	if err != nil {
		return err
	}
	return stream.SendAndClose(reply)
}

func (s *Server) importDisk(first *hostapi.ImportChunk, stream hostapi.Host_ImportDiskServer) (reply *hostapi.ImportReply, err error) {
	m, path, end, err := s.operate(first.Header, first.Ref)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := m.mustBeOff("import a disk into"); err != nil {
		return nil, err
	}
	keys, err := m.keysFor(path)
	if err != nil {
		return nil, err
	}
	defer clearKeys(keys)
	err = m.withProcess(stream.Context(), path, func(ctx context.Context, p *process) error {
		if _, err := p.Open(ctx, &hostapi.OpenRequest{Ref: first.Ref, Keys: keys}); err != nil {
			return err
		}
		out, err := p.ImportDisk(ctx)
		if err != nil {
			return err
		}
		for chunk := first; err == nil; chunk, err = stream.Recv() {
			if serr := out.Send(chunk); serr != nil {
				break // the reason comes with CloseAndRecv
			}
		}
		if err != nil && err != io.EOF {
			return err
		}
		reply, err = out.CloseAndRecv()
		return err
	})
	return reply, err
}

// Console implements hostapi.HostServer.
func (s *Server) Console(stream hostapi.Host_ConsoleServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	m := s.agent.held(first.Ref.GetUuid())
	if m == nil {
		return hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "VM %s is not powered on here: it has no console", first.Ref.GetUuid())
	}
	defer s.agent.drop(m)
	m.mu.Lock()
	console := m.console
	m.mu.Unlock()
	if console == nil {
		return hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "VM %s is powered off: it has no console", m.uuid)
	}
	line, err := console.Attach()
	if err != nil {
		return err
	}
	defer line.Close()
	go func() {
		defer line.Close()
		for {
			in, err := stream.Recv()
			if err != nil {
				return
			}
			if _, err := line.Write(in.Data); err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 16<<10)
	for {
		n, err := line.Read(buf)
		if n > 0 {
			if serr := stream.Send(&hostapi.ConsoleData{Data: append([]byte(nil), buf[:n]...)}); serr != nil {
				return serr
			}
		}
		if err != nil {
			return nil // the guest ended, or the caller went away
		}
	}
}
