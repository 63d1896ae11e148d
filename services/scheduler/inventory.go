package scheduler

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const (
	// askAtOnce bounds how many hosts are asked at the same time.
	askAtOnce = 16
	// maxInventoryPages bounds what one host can make us read: a thousand machines a page.
	maxInventoryPages = 64
)

// reasonError is an error about a named resource.
func reasonError(reason typesv1.ErrorReason, resource, format string, args ...any) *errcat.Error {
	return errcat.New(reason, format, args...).With("resource", resource)
}

func stateError(name string, state State, act Action) error {
	return reasonError(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, name, "%s of %s is not possible while it is %s", act, name, StateName(state)).
		With("state", StateName(state)).With("action", string(act))
}

// registered lists the hosts, of one site or of all.
func (s *Service) registered(ctx context.Context, site string) ([]*hostproviderv1.Host, error) {
	all, err := s.store.hosts.List(ctx, "")
	if err != nil {
		return nil, busError(err, "list hosts")
	}
	var hosts []*hostproviderv1.Host
	for _, e := range all {
		if site == "" || siteOf(e.Value.GetName()) == site {
			hosts = append(hosts, e.Value)
		}
	}
	slices.SortFunc(hosts, func(a, b *hostproviderv1.Host) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return hosts, nil
}

func (s *Service) hostClient(ctx context.Context, host string) (hostproviderv1.HostServiceClient, error) {
	conn, err := s.deps.Hosts.Conn(ctx, lastPart(host), "host-provider")
	if err != nil {
		return nil, err
	}
	return hostproviderv1.NewHostServiceClient(conn), nil
}

// found is a machine on a host.
type found struct {
	host    string
	machine *typesv1.Machine
}

// lookUp asks every host of the site for a machine by its GUID or display name. unreachable names the hosts that did not
// answer; broken is an answer that says that the machine is there and cannot be read.
func (s *Service) lookUp(ctx context.Context, site, vm string) (hits []found, unreachable []string, broken error, err error) {
	hosts, err := s.registered(ctx, site)
	if err != nil {
		return nil, nil, nil, err
	}
	var mu sync.Mutex
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(askAtOnce)
	for _, h := range hosts {
		group.Go(func() error {
			cctx, cancel := context.WithTimeout(gctx, s.cfg.CallTimeout)
			defer cancel()
			client, err := s.hostClient(cctx, h.GetName())
			var resp *hostproviderv1.GetMachineResponse
			if err == nil {
				resp, err = client.GetMachine(cctx, &hostproviderv1.GetMachineRequest{Vm: vm})
			}
			mu.Lock()
			defer mu.Unlock()
			switch reason := errcat.Reason(err); {
			case err == nil:
				hits = append(hits, found{h.GetName(), resp.GetMachine()})
			case reason == typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND:
			case Classify(reason) == ClassFatal, reason == typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE: // the host has it, and says what is wrong
				broken = err
			default:
				unreachable = append(unreachable, h.GetName())
			}
			return nil
		})
	}
	_ = group.Wait() // the functions return nil
	return hits, unreachable, broken, ctx.Err()
}

// machine finds the one machine that a name means.
func (s *Service) machine(ctx context.Context, name string) (found, error) {
	site, vm, err := splitVM(name)
	if err != nil {
		return found{}, err
	}
	hits, unreachable, broken, err := s.lookUp(ctx, site, vm)
	switch {
	case err != nil:
		return found{}, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_DEADLINE_EXCEEDED, err, "look for %s", name)
	case len(hits) > 1:
		where := make([]string, len(hits))
		for i, h := range hits {
			where[i] = h.machine.GetId() + " on " + lastPart(h.host)
		}
		return found{}, reasonError(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, name, "%q means more than one machine: %s; use an id that only one host has", name, strings.Join(where, ", "))
	case len(hits) == 1:
		return hits[0], nil
	case broken != nil:
		return found{}, broken
	case len(unreachable) > 0:
		return found{}, reasonError(typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE, name, "no host that answers has %q, and these did not answer: %s", name, strings.Join(unreachable, ", "))
	}
	return found{}, reasonError(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, name, "no registered host has a machine %q", name)
}

// record finds the record that a name means, by id or by a display name that only one record has. ok is false when
// there is none.
func (s *Service) record(ctx context.Context, name string) (key string, rec *schedulerv1.ProtectedVm, rev uint64, ok bool, err error) {
	site, vm, err := splitVM(name)
	if err != nil {
		return "", nil, 0, false, err
	}
	if site != "" {
		key = vmKey(site, vm)
		rec, rev, err = s.store.vms.Get(ctx, key)
		if err == nil {
			return key, rec, rev, true, nil
		}
		if !errors.Is(err, bus.ErrNotFound) {
			return "", nil, 0, false, busError(err, "read the record of %s", name)
		}
	}
	all, err := s.store.vms.List(ctx, "")
	if err != nil {
		return "", nil, 0, false, busError(err, "list the records")
	}
	var hits []bus.Entry[*schedulerv1.ProtectedVm]
	for _, e := range all {
		if site != "" && siteOf(e.Value.GetName()) != site {
			continue
		}
		if lastPart(e.Value.GetName()) == vm || strings.EqualFold(e.Value.GetDisplayName(), vm) {
			hits = append(hits, e)
		}
	}
	switch len(hits) {
	case 0:
		return "", nil, 0, false, nil
	case 1:
		return hits[0].Key, hits[0].Value, hits[0].Revision, true, nil
	}
	names := make([]string, len(hits))
	for i, e := range hits {
		names[i] = e.Value.GetName()
	}
	return "", nil, 0, false, reasonError(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, name, "%q means more than one protected VM: %s; use the id", name, strings.Join(names, ", "))
}

// mustRecord is record, with the error that tells an unknown VM from one that is not protected.
func (s *Service) mustRecord(ctx context.Context, name string) (string, *schedulerv1.ProtectedVm, uint64, error) {
	key, rec, rev, ok, err := s.record(ctx, name)
	if err != nil || ok {
		return key, rec, rev, err
	}
	if _, err := s.machine(ctx, name); errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND) {
		return "", nil, 0, err
	}
	return "", nil, 0, reasonError(typesv1.ErrorReason_ERROR_REASON_NOT_PROTECTED, name, "%s is not protected", name).With("vm", name)
}

// machines lists what one host has.
func (s *Service) machines(ctx context.Context, host string) (list []*typesv1.Machine, problems []*hostproviderv1.Finding, err error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.CallTimeout)
	defer cancel()
	client, err := s.hostClient(ctx, host)
	if err != nil {
		return nil, nil, err
	}
	token := ""
	for range maxInventoryPages {
		resp, err := client.ListMachines(ctx, &hostproviderv1.ListMachinesRequest{PageSize: 1000, PageToken: token})
		if err != nil {
			return nil, nil, err
		}
		list = append(list, resp.GetMachines()...)
		problems = append(problems, resp.GetProblems()...)
		if token = resp.GetNextPageToken(); token == "" {
			break
		}
	}
	return list, problems, nil
}
