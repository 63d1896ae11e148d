package rpc

import (
	"context"
	"strings"

	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// rule says who may call a method. The zero value refuses everybody.
type rule struct {
	anybody  bool // with an identity
	services []string
	role     pki.Role
}

// ruleOf reads a method's declared callers from its descriptor; false if it has none.
func ruleOf(method protoreflect.MethodDescriptor) (rule, bool) {
	opts, ok := method.Options().(*descriptorpb.MethodOptions)
	if !ok || !proto.HasExtension(opts, typesv1.E_Callers) {
		return rule{}, false
	}
	callers, ok := proto.GetExtension(opts, typesv1.E_Callers).(*typesv1.Callers)
	if !ok {
		return rule{}, false
	}
	return rule{services: callers.GetServices(), role: pki.Role(callers.GetMinimumRole())}, true
}

// allows reports whether the peer may call, and if not what is missing.
func (r rule) allows(p Peer) (ok bool, missing string) {
	if r.anybody {
		return true, ""
	}
	if p.Kind == pki.User {
		switch {
		case r.role == pki.RoleNone:
			return false, "users may not call it"
		case p.Role < r.role:
			return false, "it needs the role " + r.role.String()
		}
		return true, ""
	}
	for _, name := range r.services {
		if p.IsService(name) {
			return true, ""
		}
	}
	if len(r.services) == 0 {
		return false, "services may not call it"
	}
	return false, "its callers are " + strings.Join(r.services, ", ")
}

// findMethod returns the descriptor of "/package.Service/Method".
func findMethod(fullMethod string) (protoreflect.MethodDescriptor, bool) {
	name := strings.ReplaceAll(strings.TrimPrefix(fullMethod, "/"), "/", ".")
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(name))
	if err != nil {
		return nil, false
	}
	m, ok := d.(protoreflect.MethodDescriptor)
	return m, ok
}

// loadRules reads the rules of all registered methods and returns the methods that declare none.
func (s *Server) loadRules() (undeclared []string) {
	s.rules = make(map[string]rule)
	for service, info := range s.grpc.GetServiceInfo() {
		for _, m := range info.Methods {
			full := "/" + service + "/" + m.Name
			if service == grpc_health_v1.Health_ServiceDesc.ServiceName {
				s.rules[full] = rule{anybody: true}
				continue
			}
			r, ok := rule{}, false
			if desc, found := findMethod(full); found {
				r, ok = ruleOf(desc)
			}
			if !ok {
				undeclared = append(undeclared, full)
			}
			s.rules[full] = r
		}
	}
	return undeclared
}

// authorize decides about one call. The answer names the caller, so that an operator sees which
// certificate was used.
func (s *Server) authorize(ctx context.Context, fullMethod string) error {
	p, ok := PeerFrom(ctx)
	if !ok {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_UNAUTHENTICATED, "call %s: the caller has no identity", fullMethod)
	}
	r, declared := s.rules[fullMethod]
	if !declared {
		r = rule{}
	}
	if ok, missing := r.allows(p); !ok {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_PERMISSION_DENIED,
			"%s may not call %s: %s", p, fullMethod, missing).With("method", fullMethod).With("peer", p.Name)
	}
	return nil
}
